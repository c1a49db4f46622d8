#!/bin/sh
# Opens the studio by a double click on macOS; the environment is made beside this repository the first time.
cd "$(dirname "$0")/.." || exit 1
[ -x .venv/bin/python ] || python3 -m venv .venv || exit 1
.venv/bin/python -c 'import starlette, uvicorn, sd3pipe' 2>/dev/null || .venv/bin/python -m pip install -c constraints.txt -e '.[studio]' || exit 1
exec .venv/bin/python -P -m sd3pipe studio "$@"
