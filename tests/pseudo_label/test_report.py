"""pseudo_label report: what it tells, and how it looks in a browser."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ASCII, write_image
from matplotlib.image import imread

from nnunet_semiseg.jobs import HEADER
from nnunet_semiseg.segmentations import Classes
from pseudo_label import cli
from pseudo_label.rounds import RoundsSettings
from pseudo_label.rounds.manifest import Manifest
from pseudo_label.score_files import read_scores
from pseudo_label.scoring import score_members
from pseudo_label.selection import SelectionRules, select
from pseudo_label.selection_files import write_selection

# A class and a case that a careless page would run as code, or show as something else.
EVIL_CLASS = '<i>rim</i> & "$x_1$"'
EVIL_CASE = "<img src=x onerror=document.title=1>"
LABELS = {"background": 0, "ball": 1, EVIL_CLASS: 2}
CASES = ["case_0", "case_1", "case_2", EVIL_CASE]
MEMBERS = ("nnUNetTrainerMeanTeacher_seed=3", "nnUNetTrainer:0")


def ball(radius, shape=(10, 24, 24)):
    z, y, x = np.indices(shape) - np.array(shape).reshape(3, 1, 1, 1) // 2
    distance = np.sqrt((2 * z) ** 2 + y**2 + x**2)
    return ((distance <= radius).astype(np.uint8) + (distance <= radius / 2)).astype(np.uint8)


def make_work_folder(folder):
    """As rounds leave it after one round, without training anything."""
    classes = Classes.from_dataset_json({"labels": LABELS})
    one = folder / "round_1"
    for i, case in enumerate(CASES):
        for member, name in enumerate(("first", "second")):
            write_image(ball(8 - member * i), one / "members" / name / f"{case}.nii.gz")
        image = ball(8) + np.random.default_rng(i).normal(0, 0.1, (10, 24, 24)).astype(np.float32)
        write_image(image.astype(np.float32), one / "images" / f"{case}_0000.nii.gz")
    write_image(ball(8), folder / "labeled" / "real.nii.gz")
    write_image(ball(7), folder / "labeled" / "true.nii.gz")
    members = [one / "members" / name for name in ("first", "second")]
    scores = score_members(members, one / "scores", classes, labeled=folder / "labeled", processes=1)
    rules = SelectionRules(threshold=0.8)
    chosen = select(scores, rules)
    write_selection(one / "scores", one / "selection", chosen, scores, classes, 0.0)
    for number, job in ((0, "train_first"), (1, "train_first"), (1, "predict_first")):
        log = folder / f"round_{number}" / "logs" / f"{job}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        hour = 10 * number + ("train" in job)
        log.write_text(f"{HEADER}{job} on host, 2030-01-01 {hour:02d}:00:00: nnUNetv2 {job} <&> {number}\nmore\n")
    settings = RoundsSettings("Dataset001_a", "2d", "nnUNetPlans", MEMBERS, 2, rules)
    arguments = json.loads(json.dumps(settings, default=lambda value: vars(value)))
    dice = [
        {f"{name.partition(':')[0]}_fold0": 0.5 + 0.1 * i + 0.05 * j for i, name in enumerate(MEMBERS)} for j in (0, 1)
    ]
    done = {"finished": "2030-01-01 10:30:00", "minutes": 1.5}
    accepted = [case for case, decision in chosen.items() if decision.accepted]
    rounds = [
        {"dataset": "Dataset001_a", "steps": {"train": done}, "validation": dice[0]},
        {
            "dataset": "Dataset002_a_round1",
            "steps": dict.fromkeys(("predict", "score", "select", "build", "train"), done),
            "predicted": 4,
            "drift": [f"no case has {EVIL_CLASS}"],
            "mean_score": 0.8,
            "accepted": accepted,
            "annotate": [EVIL_CASE],
            "remaining": 4 - len(accepted),
            "validation": dice[1],
            "score_command": "pseudo_label score",
            "select_command": "pseudo_label select",
        },
    ]
    versions = {"nnunetv2": "2.8.1"}
    calls = ["pseudo_label rounds -d 1"]
    Manifest(folder / "manifest.json", arguments, rounds, "No case <is> accepted", versions, calls).write()


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "work"
    make_work_folder(folder)
    assert cli.main(["report", str(folder)]) == 0
    return folder


def test_json_tells_what_happened(reported):
    content = json.loads((reported / "report.json").read_text())
    assert content["stopped"] == "No case <is> accepted" and content["versions"] == {"nnunetv2": "2.8.1"}
    assert [member["seed"] for member in content["members"]] == [3, None]
    zero, one = content["rounds"]
    assert zero["cases"] == [] and zero["accepted"] is None
    scores = read_scores(reported / "round_1" / "scores")
    assert {case["case"]: case["score"] for case in one["cases"]} == {c: s.score for c, s in scores.items()}
    assert [case["score"] for case in one["cases"]] == sorted((s.score for s in scores.values()), reverse=True)
    for case in one["cases"]:
        assert case["accepted"] is (case["score"] >= 0.8) is (case["case"] in one["accepted"])
        assert ("below 0.8" in case["reasons"]) is not case["accepted"]
    volumes = [scores[case].classes["ball"].volume_mm3 for case in CASES]
    assert one["volumes_mm3"]["ball"] == pytest.approx(np.mean(volumes))
    lines = [command["line"] for command in one["commands"]]
    assert lines == [
        "nnUNetv2 predict_first <&> 1",
        "pseudo_label score",
        "pseudo_label select",
        "nnUNetv2 train_first <&> 1",
    ]


def test_the_page_is_one_file_and_names_are_only_text(reported):
    page = (reported / "report.html").read_text(encoding="utf-8")
    # Whatever the browser would load is in the page.
    assert set(re.findall(r'(?:src|href)="([^",]{0,20})', page)) <= {"data:image/svg+xml;b", "data:image/png;base6"}
    assert not re.search(r"url\(|@import|<script|<link|https?://", page)
    assert EVIL_CASE not in page and EVIL_CLASS not in page
    assert "&lt;img src=x" in page and "No case &lt;is&gt; accepted" in page
    assert page.count("data:image/png") == len(CASES)
    for text in ("Validation Dice", "Volume drift", "To annotate next", "pseudo_label rounds -d 1", "2.8.1", "not set"):
        assert text in page


def test_the_same_folder_gives_the_same_report(reported):
    before = [(reported / name).read_bytes() for name in ("report.html", "report.json")]
    assert cli.main(["report", str(reported)]) == 0
    assert before == [(reported / name).read_bytes() for name in ("report.html", "report.json")]


@pytest.mark.slow
def test_a_machine_that_knows_ascii_alone_writes_the_same_page(reported):
    pages = []
    # Two processes: what else ran in this one may have changed how matplotlib draws.
    for environment in ({}, ASCII):
        command = [sys.executable, "-m", "pseudo_label.cli", "report", str(reported)]
        subprocess.run(command, env=os.environ | environment, check=True)
        pages.append((reported / "report.html").read_bytes())
    assert pages[0] == pages[1] and not pages[0].isascii()


def test_rounds_that_have_only_begun(tmp_path):
    make_work_folder(tmp_path / "work")
    for steps in ({}, {"predict": {"minutes": 1.0, "finished": "2030-01-01 10:30:00"}}):
        content = json.loads((tmp_path / "work" / "manifest.json").read_text())
        content["rounds"][1] = {"dataset": "Dataset002_a_round1", "steps": steps}
        content["stopped"] = None
        (tmp_path / "work" / "manifest.json").write_text(json.dumps(content))
        assert cli.main(["report", str(tmp_path / "work")]) == 0
        assert "Not finished" in (tmp_path / "work" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("content", [None, "{", '{"rounds": 1, "oops": 2}'])
def test_bad_input_is_one_line(tmp_path, capsys, content):
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    assert cli.main(["report", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("Error: ") and str(tmp_path / "manifest.json") in error and error.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


def test_damaged_files_of_rounds_are_named(tmp_path, capsys):
    make_work_folder(tmp_path)
    capsys.readouterr()
    for name, content, message in (
        ("round_1/selection/selection.csv", "case,accepted,reasons\nm\xfcller,no,\n", "is not UTF-8"),
        ("round_1/selection/selection.csv", "name;accepted;reasons\n", "has no column 'case'"),
        ("manifest.json", '{"arguments": {}, "rounds": [{}], "stopped": null}', "damaged (it has no rounds)"),
        ("manifest.json", "[]", "has no keys"),
    ):
        (tmp_path / name).write_text(content, encoding="latin-1")
        assert cli.main(["report", str(tmp_path)]) == 1
        error = capsys.readouterr().err
        assert str(tmp_path / name) in error and message in error and error.count("\n") == 1, error


# -------------------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """The command line of a headless Chromium, to which a test adds what it wants and the page."""
    program = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    if program is None:
        if os.geteuid() != 0 or shutil.which("apt-get") is None:
            pytest.skip("there is no Chromium, and it cannot be installed here")
        install = "apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium"
        result = subprocess.run(["sh", "-c", install], capture_output=True, text=True)
        if result.returncode:
            pytest.skip(f"Chromium cannot be installed: {result.stderr.strip()[-200:]}")
        program = shutil.which("chromium")
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"
    flags += " --disable-component-update --disable-quic --hide-scrollbars"
    return [program, *flags.split(), f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]


@pytest.mark.parametrize("width", [1200, 600])
def test_its_look(reported, browser, tmp_path, width):
    picture = tmp_path / "page.png"
    page = (reported / "report.html").as_uri()
    command = [*browser, f"--window-size={width},3000", f"--screenshot={picture}", page]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    pixels = imread(picture)[..., :3]
    assert pixels.shape[1] == width
    # Nothing runs out of the page to the right; text and pictures reach down the page.
    assert (pixels[:, -4:] == 1).all()
    rows = (pixels < 0.9).any((1, 2))
    assert rows[:600].any() and rows[1500:2000].any()
    # Contours have the first class's color, accepted cases are green: pictures and styles are there.
    for color in ((0x1F, 0x77, 0xB4), (0x1B, 0x78, 0x37)):
        assert (np.abs(pixels - np.array(color) / 255).max(-1) < 0.02).sum() > 50


def test_no_name_is_run_as_code(reported, browser):
    page = (reported / "report.html").as_uri()
    result = subprocess.run(
        [*browser, "--dump-dom", page], check=True, capture_output=True, encoding="utf-8", timeout=120
    )
    assert "<title>Rounds of Dataset001_a</title>" in result.stdout
    assert "onerror=document" in result.stdout and "<img src=x" not in result.stdout.replace("&lt;", "_")
