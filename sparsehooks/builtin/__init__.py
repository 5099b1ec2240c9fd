"""The built-in plugins: ordinary plugins that use public names only."""
