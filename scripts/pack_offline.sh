#!/usr/bin/env bash
# Pack an environment into one archive, to install it where there is no network and torch is provided.
#
#   bash scripts/pack_offline.sh ARCHIVE.tar [--python 3.12] [--without NAME ...]
#
# PYTHON names the interpreter whose environment is packed (default python3): wheels of its packages in the versions that
# are installed, and of this project as it is in this folder. torch, torchvision and what belongs to them are left out.
# --python: the Python of the other machine, if it is not that of PYTHON. --without: packages that the other machine has.
# It has to have this machine's operating system and processor. install_offline.sh, in the archive as install.sh, is the
# counterpart.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
[[ ${1:-} == *.tar ]] || { sed -n '2,4s/^# \{0,1\}//p' "$0" >&2; exit 2; }
archive=$1
shift
[[ -d $(dirname "$archive") ]] || { echo "Error: there is no folder $(dirname "$archive")" >&2; exit 1; }
own=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
wanted=$own
without=(nnunet-semiseg pip torch torchvision torchaudio triton)
while [[ $# -gt 0 ]]; do
    case $1 in
        --python) wanted=$2; shift 2 ;;
        --without) shift; while [[ $# -gt 0 && $1 != --* ]]; do without+=("$1"); shift; done ;;
        *) echo "Error: there is no option $1" >&2; exit 2 ;;
    esac
done

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
folder=$work/nnunet-semiseg-offline wheels=$work/nnunet-semiseg-offline/wheels
mkdir -p "$wheels" "$folder/scripts"
pip() { "$python" -m pip --disable-pip-version-check "$@"; }

# pip's own lists leave out argparse, which packages require all the same, and "freeze" has paths of folders in it.
"$python" - "${without[@]}" > "$work/versions.txt" <<'END'
import re
import sys
from importlib.metadata import distributions


def name_of(text):
    return re.sub("[-_.]+", "-", text).lower()


# Not what lies in the current folder.
sys.path.remove("")
versions = {name_of(found.metadata["Name"]): found.version for found in distributions()}
for name in sorted(set(versions) - set(map(name_of, sys.argv[1:]))):
    if not name.startswith(("nvidia-", "cuda-")):
        print(f"{name}=={versions[name]}")
END
grep -q '^nnunetv2==' "$work/versions.txt" || { echo "Error: $python has no nnunetv2. Set PYTHON" >&2; exit 1; }
# Those that are published as source alone are built.
pip wheel -q --no-deps -w "$wheels" -r "$work/versions.txt" "$root"
if [[ $wanted != "$own" ]]; then
    # Pure Python stays.
    find "$wheels" -name '*.whl' ! -name '*-none-any.whl' -printf '%f\n' > "$work/compiled.txt"
    sed 's/^\([^-]*\)-\([^-]*\)-.*/\1==\2/' "$work/compiled.txt" > "$work/again.txt"
    (cd "$wheels" && xargs -r rm < "$work/compiled.txt")
    pip download -q --no-deps --only-binary :all: --python-version "$wanted" -d "$wheels" -r "$work/again.txt"
fi

sed 's/==.*//' "$work/versions.txt" > "$folder/names.txt"
echo "$wanted" > "$folder/python.txt"
cp "$root/scripts/install_offline.sh" "$folder/install.sh"
cp "$root"/scripts/{check_gpu,benchmark_step,check_resume}.py "$folder/scripts"
# Wheels are compressed.
tar cf "$archive.unfinished" -C "$work" "$(basename "$folder")"
mv "$archive.unfinished" "$archive"
echo "$archive: $(find "$wheels" -name '*.whl' | wc -l) packages for Python $wanted, $(du -h "$archive" | cut -f 1)"
