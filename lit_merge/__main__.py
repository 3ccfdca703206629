"""``python -m lit_merge``: the same as ``lit-merge``.

The file is also the script for launchers that want one: ``fabric run lit_merge/__main__.py fit …``.
"""

import sys

if not __package__:  # started as a script: its folder must not shadow other packages' modules
    sys.path.pop(0)

from lit_merge.cli import main

if __name__ == "__main__":
    sys.exit(main())
