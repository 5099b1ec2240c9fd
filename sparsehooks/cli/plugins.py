"""``sparsehooks plugins``."""

from __future__ import annotations

from sparsehooks.cli.options import Json, NoAutoload, PluginNames, print_json, print_table


def run(plugin: PluginNames = [], no_autoload: NoAutoload = False, json: Json = False) -> None:  # noqa: B006
    """List the plugins: where each comes from, what it offers, and what is wrong with it."""
    from sparsehooks.plugins import PluginManager

    found = PluginManager(plugin, autoload=not no_autoload).plugins
    if json:
        keys = ("name", "source", "distribution", "version", "status", "hooks", "components")
        print_json([{key: getattr(plugin, key) for key in keys} for plugin in found])
        return
    print_table(
        ("plugin", "source", "distribution", "hooks", "components", "status"),
        (
            (
                plugin.name,
                plugin.source,
                f"{plugin.distribution} {plugin.version}" if plugin.distribution else "",
                ", ".join(plugin.hooks),
                ", ".join(plugin.components),
                plugin.status,
            )
            for plugin in found
        ),
    )
