# Sourced by demo.sh and test.sh: a virtual environment with the package and the extras given as the first argument.
# PYTHON chooses the interpreter, JITEXPORT_VENV the place of the environment, TORCH the version of torch for a new one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-$(command -v python3.11 || command -v python3)}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed" >&2; exit 3; }
command -v g++ >/dev/null || command -v clang++ >/dev/null ||
  { echo "a C++ compiler is needed to build engines (Debian, Ubuntu: apt-get install g++)" >&2; exit 3; }

torch=${TORCH:-2.13.0}
venv=${JITEXPORT_VENV:-.venv}
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
# shellcheck disable=SC1091
source "$venv/bin/activate"
# torch first and by its exact version: anything that lets the resolver choose may take several GB of CUDA packages.
python -c 'import torch' 2>/dev/null || python -m pip install --quiet "torch==$torch"
# An environment that is there already keeps its torch, unless another one was asked for by name.
python - "${TORCH:-}" <<'END'
import sys
from importlib.metadata import version
if sys.argv[1] and version("torch").split("+")[0] != sys.argv[1]:
    sys.exit(f"{sys.prefix} has torch {version('torch')}, not {sys.argv[1]}: name another one by JITEXPORT_VENV")
END
python -m pip install --quiet --editable ".[$1]"
