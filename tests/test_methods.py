"""Every method: which networks each of its terms trains, and its walk from training to an exported model."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import EVERYWHERE, SHORT, UNLABELED_TERMS, flat, make_case, short, train_steps
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.run_training import run_training

from nnunet_semiseg import cli
from nnunet_semiseg.trainers.options import build_options, parse_suffix
from nnunet_semiseg.trainers.registry import TRAINERS, find_trainer
from nnunet_semiseg.trainers.two_networks import TwoNetworkTrainer

STUDENT, SECOND, BOTH = {"student"}, {"second"}, {"student", "second"}
# Term -> the networks that it trains. Supervised terms are of the student unless they say otherwise.
CONSISTENCY = {"supervised": STUDENT, "consistency": STUDENT}
PSEUDO = {"supervised": STUDENT, "pseudo": STUDENT}
COPY_PASTE = dict.fromkeys(("mixed_out", "mixed_in"), STUDENT)
BY_ORIGIN = dict.fromkeys(("supervised_out", "pseudo_out", "supervised_in", "pseudo_in"), STUDENT)
CORANET, HEADS = {**CONSISTENCY, "certain": STUDENT}, {"student", "heads"}
DTML = {"supervised": STUDENT, "mask": SECOND, "consistency_labeled": BOTH, "consistency": BOTH}
DISTANCE = {"student", "distance_head"}
TERMS = {
    "MeanTeacher": CONSISTENCY,
    "UAMT": CONSISTENCY,
    "PiModel": CONSISTENCY,
    "EntropyMinimization": {"supervised": STUDENT, "entropy": STUDENT},
    "CoraNet": {**CORANET, **dict.fromkeys(("conservative", "radical"), HEADS)},
    "CoraNet_all_heads=true": {
        **CORANET,
        **dict.fromkeys(("conservative", "radical", "conservative_certain", "radical_certain", "consistency"), HEADS),
    },
    "CoraNet_uncertainty=aleatoric": {**CORANET, "aleatoric": HEADS},
    "MeanTeacherBURL": PSEUDO,
    "MeanTeacherBURL_region_normalized=true": PSEUDO,
    "BCP": COPY_PASTE,
    "BCP_origin_normalized=true": BY_ORIGIN,
    "BCPBURL": COPY_PASTE,
    "BCPBURL_origin_normalized=true": BY_ORIGIN,
    "BCPBURL_region_normalized=true": BY_ORIGIN,
    "CPS": {"supervised": STUDENT, "supervised_second": SECOND, "cross_first": STUDENT, "cross_second": SECOND},
    "DTML": DTML,
    "DTML_supervision=both": {**DTML, "distance": SECOND},
    "DTC": {"supervised": STUDENT, "distance": DISTANCE, "consistency_labeled": DISTANCE, "consistency": DISTANCE},
    "DualStream_mistake_weight=0.5_confidence=0.3": {
        "supervised": STUDENT,
        "supervised_second": SECOND,
        "mistake_first": STUDENT,
        "mistake_second": SECOND,
        "pseudo_first": STUDENT,
        "pseudo_second": SECOND,
        "disagreement": BOTH,
        "contrast_first": STUDENT,
        "contrast_second": SECOND,
    },
}


def test_every_method_is_in_the_table():
    assert {f"nnUNetTrainer{name.split('_')[0]}" for name in TERMS} == set(TRAINERS)


def perturb(module, amount=0.05):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(amount * torch.randn_like(parameter))


@pytest.mark.parametrize("kind, configuration", [("labels", "2d"), ("regions_ignore", "3d_fullres")])
@pytest.mark.parametrize("method", TERMS)
def test_each_term_trains_the_networks_it_should_and_no_others(started, method, kind, configuration):
    torch.manual_seed(0)
    trainer = started(short(f"nnUNetTrainer{method}"), kind, configuration)
    train_steps(trainer, 2)
    assert trainer._non_finite_total == 0
    # No two networks agree.
    for companion in trainer.companions.values():
        perturb(companion)
    batch = next(trainer.dataloader_train)
    trainer.global_step = 3
    if method.startswith("CoraNet"):
        trainer.before_step()
        original = trainer.next_unlabeled
        trainer.next_unlabeled = lambda: {**original(), "certain": torch.rand(batch["data"].shape) < 0.5}
    modules = {"student": trainer.network, **dict(trainer.companions)}
    reached = {}
    trainer._unlabeled_keys = []
    for group in trainer.losses(batch["data"], batch["target"]):
        for term, (value, weight) in group.items():
            assert weight > 0 and torch.isfinite(value), term
            reached[term] = set()
            for name, module in modules.items():
                parameters = [p for p in module.parameters() if p.requires_grad]
                if not parameters:
                    continue
                gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
                gradients = torch.cat([g.flatten() for g in gradients if g is not None] or [torch.zeros(1)])
                assert torch.isfinite(gradients).all(), term
                if gradients.abs().sum() > 0:
                    reached[term].add(name)
    assert reached == TERMS[method]
    # A teacher has no parameter that could be trained.
    if trainer.teacher is not None:
        assert not [p for p in trainer.teacher.parameters() if p.requires_grad]


PRESETS = [(name, preset) for name in TRAINERS for preset in getattr(find_trainer(name).Options, "PRESETS", {})]


@pytest.mark.parametrize("name, preset", PRESETS)
def test_presets_are_settings_that_a_name_could_have(name, preset):
    options = find_trainer(name).Options
    values = options.PRESETS[preset]
    suffix = "".join(f"_{key}={str(value).lower()}" for key, value in values.items())
    assert parse_suffix(suffix, options)[0] == values
    built = build_options(options, parse_suffix(f"_preset={preset}", options)[0])
    assert {key: getattr(built, key) for key in values} == values


@pytest.mark.parametrize("name, preset", PRESETS)
def test_presets_train(started, name, preset):
    trainer = started(f"{name}_preset={preset}{SHORT}")
    train_steps(trainer, trainer._total_steps)
    assert trainer._non_finite_total == 0
    assert bool(UNLABELED_TERMS & set(trainer._epoch_sums)) == trainer.needs_unlabeled()


@pytest.mark.parametrize(
    "option",
    [
        *("MeanTeacher_consistency_weight=0", "UAMT_consistency_weight=0", "PiModel_consistency_weight=0"),
        *("EntropyMinimization_entropy_weight=0", "MeanTeacherBURL_pseudo_weight=0", "CPS_pseudo_weight=0"),
        *("DTC_consistency_weight=0", "DTML_setting=labeled", "DTML_setting=distance", "DTML_consistency_weight=0"),
        *("DualStream_preset=code", "CoraNet_setting=seg"),
    ],
)
def test_settings_without_unlabeled_data_need_none(make_trainer, option):
    with_all, without = (make_trainer(f"nnUNetTrainer{name}") for name in (option.split("_")[0], option))
    assert with_all.needs_unlabeled() and not without.needs_unlabeled()


# What switches a method's unlabeled half off, where its supervised part is nnU-Net's own.
OFF = {
    "MeanTeacher": "_consistency_weight=0",
    "CoraNet": "_setting=seg_head_gradient=0",
    "UAMT": "_consistency_weight=0",
    "PiModel": "_consistency_weight=0",
    "EntropyMinimization": "_entropy_weight=0",
    "MeanTeacherBURL": "_pseudo_weight=0_labeled_regions=none",
    "BCP": "_pretraining=1",
    "BCPBURL": "_pretraining=1_labeled_regions=none",
    "CPS": "_pseudo_weight=0",
    "DTML": "_setting=segmentation",
    "DTC": "_consistency_weight=0_distance_weight=0",
    "DualStream": "_pseudo_weight=0_disagreement_weight=0_contrast_weight=0",
}


@pytest.fixture(scope="module")
def vanilla():
    """By kind and configuration: the student after four steps of Mean Teacher with weight 0, which equals stock
    nnU-Net's."""
    return {}


@pytest.mark.parametrize("where", [("labels", "2d"), ("regions", "3d_fullres"), ("regions_ignore", "2d")], ids="-".join)
@pytest.mark.parametrize("method", OFF)
def test_switched_off_the_student_trains_as_in_stock_nnunet(started, vanilla, method, where):
    def train(method):
        trainer = started(f"nnUNetTrainer{method}{OFF[method]}{SHORT}", *where)
        train_steps(trainer, 4)
        return flat(trainer.network)

    if where not in vanilla:
        vanilla[where] = train("MeanTeacher")
    assert torch.equal(train(method), vanilla[where])


def predict(folder: Path, image: np.ndarray) -> np.ndarray:
    """What nnU-Net's own predictor makes of a model folder."""
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False, use_mirroring=False)
    predictor.initialize_from_trained_model_folder(str(folder), use_folds=(0,))
    return predictor.predict_single_npy_array(image[None], {"spacing": [1.0, 1.0, 1.0]}, None, None, True)


# Settings with another head or another network that predicts.
VARIANTS = ["nnUNetTrainerDTML_supervision=both", "nnUNetTrainerDTML_setting=distance_supervision=distance"]
WALKS = [(name, *where) for name in TRAINERS for where in EVERYWHERE]
WALKS += [(name, "labels", "2d") for name in VARIANTS]


@pytest.mark.parametrize("name, kind, configuration", WALKS)
def test_train_predict_export(prepared, work, tmp_path, monkeypatch, name, kind, configuration):
    from nnunetv2.training.logging.nnunet_logger import LocalLogger

    monkeypatch.setattr(LocalLogger, "plot_progress_png", lambda self, folder: None)
    trainer = short(name)
    run_training(prepared(kind), configuration, 0, trainer, "nnUNetPlans_cpu", device=torch.device("cpu"))
    dataset = work / "results" / prepared(kind)
    model = dataset / f"{trainer}__nnUNetPlans_cpu__{configuration}"
    image = make_case(300)[0]
    segmentation, probabilities = predict(model, image)
    assert segmentation.shape == image.shape and set(np.unique(segmentation)) <= {0, 1, 2}
    assert np.isfinite(probabilities).all()

    exported = tmp_path / "exported"
    assert cli.main(["export", "-i", str(model), "-o", str(exported)]) == 0
    assert np.array_equal(predict(exported, image)[1], probabilities)

    second = dataset / f"{trainer}_second__nnUNetPlans_cpu__{configuration}"
    if "setting=distance" in name:
        # The network of the plans was not trained.
        assert not second.exists()
    elif issubclass(find_trainer(name), TwoNetworkTrainer):
        assert np.isfinite(predict(second, image)[1]).all()
        assert not np.array_equal(predict(second, image)[1], probabilities)
        shutil.rmtree(second)
    shutil.rmtree(model)


@pytest.mark.parametrize("method, worse", [("CoraNet", 0), ("CPS", 0), ("CPS", 1), ("DualStream", 1)])
def test_pretraining_goes_on_until_every_class_is_known_to_every_network(started, method, worse):
    trainer = started(f"nnUNetTrainer{method}_pretraining=0_min_recall=0.5_num_iterations_per_epoch=2_3epochs_seed=1")
    unlabeled = {"certain", "cross_first", "pseudo_first"}
    # An epoch without a class says nothing of it; before the first one with it, it is not known.
    trainer.on_train_epoch_end([{"loss": np.zeros(())}])
    assert not trainer.knows_classes
    for knows_core, expected in ((False, False), (True, True)):
        trainer.on_train_epoch_start()
        train_steps(trainer, 2)
        assert not unlabeled & set(trainer._epoch_sums)
        found, present = trainer._recall_counts.unbind(1)
        assert (present > 0).all() and (found <= present).all() and torch.equal(present[0], present[-1])
        found.copy_(present)
        found[worse] *= torch.tensor([0.9, 0.6 if knows_core else 0.4])
        trainer.on_train_epoch_end([{"loss": np.zeros(())}])
        recall = {"ball": pytest.approx(0.9), "core": pytest.approx(0.6 if knows_core else 0.4)}
        assert trainer.method_state() == {"phase_2_start": None, "knows_classes": expected, "recall": recall}
        trainer.current_epoch += 1
    trainer.on_train_epoch_start()
    assert trainer.uses_unlabeled()
    train_steps(trainer, 1)
    assert trainer.phase_2_start == pytest.approx(4 / 6) and unlabeled & set(trainer._epoch_sums)
