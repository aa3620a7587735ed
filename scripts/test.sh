#!/usr/bin/env bash
# Make an environment (.venv-test beside this project, or $TEST_ENV) and run the tests; arguments go to pytest.
# With "fast" as the first, those that are marked as slow are left out.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
env=${TEST_ENV:-$root/.venv-test}
if [[ ! -x $env/bin/pytest || ! -x $env/bin/nnunet_semiseg ]]; then
    [[ -x $env/bin/python ]] || "${PYTHON:-python3}" -m venv "$env"
    "$env/bin/python" -m pip install -q --disable-pip-version-check -e "$root[test]"
fi
cd "$root"
if [[ ${1:-} == fast ]]; then
    shift
    set -- -m "not slow" "$@"
fi
# No network from here on.
PATH=$env/bin:$PATH "$env/bin/python" -m pytest -n auto --maxprocesses 4 "$@"
