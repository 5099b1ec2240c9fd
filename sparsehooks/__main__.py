"""``python -m sparsehooks``."""

from sparsehooks.cli import main

main()
