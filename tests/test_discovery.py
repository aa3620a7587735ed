"""Stock nnU-Net finds the trainers right after an install, from anywhere."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest
from conftest import REPOSITORY

FIND = """
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find
import inspect
for name in {names!r}:
    print(name, inspect.getfile(find(name)))
"""


def python(executable, code, cwd, **environment):
    clean = {k: v for k, v in os.environ.items() if k not in ("nnUNet_extTrainer", "PYTHONPATH")}
    return subprocess.run(
        [str(executable), "-c", code], cwd=cwd, env={**clean, **environment}, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            str(folder),
            str(REPOSITORY),
        ],
        check=True,
    )
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def install(tmp_path_factory, wheel):
    """``install(kind)``: a fresh environment with the project as wheel or editable, and nnU-Net borrowed from here."""
    done = {}

    def make(kind):
        if kind not in done:
            if kind == "editable":
                pytest.importorskip("editables")
            folder = tmp_path_factory.mktemp(kind) / "env"
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
            executable = folder / "bin" / "python"
            site = subprocess.run(
                [executable, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
                capture_output=True,
                text=True,
                check=True,
            ).stdout.strip()
            # A path line does not run the .pth files in that folder, so this environment's own install is not seen.
            with open(f"{site}/borrowed.pth", "w") as stream:
                stream.write(sysconfig.get_path("purelib") + "\n")
            what = [str(wheel)] if kind == "wheel" else ["--no-build-isolation", "-e", str(REPOSITORY)]
            subprocess.run(
                [executable, "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", *what], check=True
            )
            done[kind] = executable
        return done[kind]

    return make


@pytest.mark.parametrize("kind", ["wheel", "editable"])
@pytest.mark.slow
def test_stock_search_finds_trainers_and_variants_from_another_folder(install, tmp_path, kind):
    names = ["nnUNetTrainerCoraNet", "nnUNetTrainerMeanTeacher_20epochs_ema_decay=0.999_num_iterations_per_epoch=50"]
    result = python(install(kind), FIND.format(names=names), tmp_path)
    assert result.returncode == 0, result.stderr
    for name, file in zip(names, ("coranet.py", "mean_teacher.py")):
        found = next(line for line in result.stdout.splitlines() if line.startswith(name + " "))
        assert found.endswith(file)
        assert found.split()[1].startswith(str(REPOSITORY)) == (kind == "editable")


def test_bad_option_is_one_line_and_the_trainer_is_not_found(tmp_path):
    result = python(sys.executable, FIND.format(names=["nnUNetTrainerCoraNet_alhpa=5"]), tmp_path)
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if line.startswith("nnunet_semiseg:")]
    assert len(lines) == 1
    assert "no option 'alhpa'" in lines[0] and "alpha (float, default 5.0" in lines[0]
    assert "Could not find requested nnunet trainer nnUNetTrainerCoraNet_alhpa=5" in result.stderr


def test_start_up_imports_nothing_heavy_and_keeps_the_users_value(install, tmp_path):
    heavy = ["torch", "nnunetv2", "numpy", "nnunet_semiseg.cli"]
    code = f"import os, sys; print(os.environ['nnUNet_extTrainer']); print([m for m in {heavy} if m in sys.modules])"
    result = python(install("wheel"), code, tmp_path, nnUNet_extTrainer="/mine")
    folders, modules = result.stdout.splitlines()
    assert folders.split(os.pathsep)[0] == "/mine" and folders.endswith("_discovery")
    assert modules == "[]"
    # Inherited by a child process, the value stays as it is.
    again = python(install("wheel"), code, tmp_path, nnUNet_extTrainer=folders).stdout.splitlines()[0]
    assert again == folders


@pytest.mark.parametrize("damage", ["removed", "broken"])
def test_damaged_install_is_silent_at_start_up(tmp_path, damage):
    """The .pth file alone, beside no package or one that does not import."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "nnunet_semiseg.pth").write_text((REPOSITORY / "nnunet_semiseg.pth").read_text())
    if damage == "broken":
        (site / "nnunet_semiseg").mkdir()
        (site / "nnunet_semiseg" / "__init__.py").write_text("raise SystemError('half an upgrade')")
    # -S: no other site folder is seen.
    code = f"import site; site.addsitedir({str(site)!r}); print('alive')"
    result = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (result.stdout.strip(), result.stderr) == ("alive", "")


@pytest.fixture
def archive(tmp_path):
    """What scripts/pack_offline.sh packs, without wheels but for one that pip never takes for installed."""
    folder = tmp_path / "archive"
    (folder / "wheels").mkdir(parents=True)
    with zipfile.ZipFile(folder / "wheels" / "argparse-1.4.0-py3-none-any.whl", "w") as wheel:
        info = "argparse-1.4.0.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: argparse\nVersion: 1.4.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    (folder / "names.txt").touch()
    (folder / "python.txt").write_text(".".join(map(str, sys.version_info[:2])) + "\n")
    (folder / "install.sh").write_text((REPOSITORY / "scripts" / "install_offline.sh").read_text())
    return folder


def install_offline(archive, folder, executable=sys.executable):
    command = ["bash", str(archive / "install.sh"), str(folder), str(executable)]
    clean = {k: v for k, v in os.environ.items() if k not in ("nnUNet_extTrainer", "PYTHONPATH")}
    return subprocess.run(command, capture_output=True, text=True, env=clean, cwd=archive)


@pytest.mark.slow
def test_offline_install_finds_trainers_beside_the_torch_that_is_there(archive, wheel, tmp_path):
    shutil.copy(wheel, archive / "wheels")
    result = install_offline(archive, tmp_path / "env")
    assert result.returncode == 0, result.stdout + result.stderr
    found = python(tmp_path / "env" / "bin" / "python", FIND.format(names=["nnUNetTrainerCoraNet"]), tmp_path)
    assert str(tmp_path / "env") in found.stdout, found.stderr


def test_offline_install_says_what_is_wrong_with_the_python(archive, tmp_path):
    without_torch = tmp_path / "python"
    without_torch.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    without_torch.chmod(0o755)
    result = install_offline(archive, tmp_path / "env", without_torch)
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert result.stderr.startswith(
        f"Error: {without_torch} cannot import torch and torchvision (No module named 'torch')"
    )
    (archive / "python.txt").write_text("3.7\n")
    result = install_offline(archive, tmp_path / "env")
    assert result.returncode == 1 and result.stderr.startswith("Error: the archive is for Python 3.7, but ")
    assert result.stderr.count("\n") == 1 and not (tmp_path / "env").exists()


def test_wheel_has_the_pth_file_and_one_file_in_discovery(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "nnunet_semiseg.pth" in names
    assert {f"{package}/py.typed" for package in ("nnunet_semiseg", "pseudo_label", "dataset_conversion")} <= set(names)
    assert [n for n in names if "_discovery/" in n] == ["nnunet_semiseg/_discovery/semiseg_trainers.py"]
    assert not [n for n in names if n.startswith(("tests", "scripts", "docs"))]


def test_extending_twice_changes_nothing(monkeypatch):
    import nnunet_semiseg

    monkeypatch.setenv("nnUNet_extTrainer", "/mine")
    nnunet_semiseg.extend_trainer_search()
    once = os.environ["nnUNet_extTrainer"]
    nnunet_semiseg.extend_trainer_search()
    assert os.environ["nnUNet_extTrainer"] == once == os.pathsep.join(["/mine", nnunet_semiseg.DISCOVERY_FOLDER])
