#!/usr/bin/env bash
# Install what pack_offline.sh packed, without network, beside the torch of this machine.
#
#   bash install.sh FOLDER [PYTHON]
#
# Makes an environment in FOLDER. It sees the packages of PYTHON (default python3), torch and torchvision among them, and
# changes none of them: what is missing there, or too old, is installed in FOLDER.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
[[ $# -ge 1 ]] || { sed -n '2,4s/^# \{0,1\}//p' "$0" >&2; exit 2; }
folder=$1 python=${2:-python3}
fail() { echo "Error: $*" >&2; exit 1; }

packed=$(cat "$here/python.txt")
own=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || fail "$python is no Python"
[[ $own == "$packed" ]] || fail "the archive is for Python $packed, but $python is $own. Pack it with --python $own"
# Where torch lies, which a module of the cluster may bring (PYTHONPATH), and the site folders.
seen=$("$python" - "$python" <<'END'
import os
import sys

try:
    import torch
    import torchvision
except Exception as error:
    sys.exit(
        f"Error: {sys.argv[1]} cannot import torch and torchvision ({error}). Load the module that has them, or name "
        "the Python that does"
    )
folders = [os.path.dirname(os.path.dirname(module.__file__)) for module in (torch, torchvision)]
folders += [path for path in sys.path if os.path.basename(path) in ("site-packages", "dist-packages")]
print("\n".join(dict.fromkeys(map(os.path.abspath, folders))))
END
) || exit 1

"$python" -m venv "$folder"
echo "$seen" > "$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/provided.pth"
# The one that comes with an environment may be too old for torch, and would hide the provided one.
"$folder/bin/python" -m pip uninstall -q -y --disable-pip-version-check setuptools 2> /dev/null
install=("$folder/bin/python" -m pip install -q --disable-pip-version-check --no-index --find-links "$here/wheels")
"${install[@]}" -r "$here/names.txt" "$here"/wheels/nnunet_semiseg-*.whl
# Also if PYTHON has another version of it.
"${install[@]}" --no-deps --force-reinstall "$here"/wheels/nnunet_semiseg-*.whl
"$folder/bin/python" - <<'END'
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

recursive_find_trainer_class_by_name("nnUNetTrainerMeanTeacher")
END
echo "nnU-Net finds the trainers. Next: source $folder/bin/activate && nnunet_semiseg doctor"
