"""Every method: its terms' weights and the networks they train, and its walk from training to an exported model."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    EVERYWHERE,
    SHORT,
    UNLABELED_TERMS,
    fitting,
    five_stages,
    flat,
    make_case,
    perturb,
    short,
    slow_unless,
    train_steps,
)
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.run_training import run_training

from nnunet_semiseg import cli
from nnunet_semiseg.trainers.options import build_options, parse_suffix
from nnunet_semiseg.trainers.registry import TRAINERS, find_trainer

# One of labels, in 2D, for the fast selection as well.
TWO_KINDS = slow_unless(
    [("labels", "2d"), ("regions_ignore", "3d_fullres")], lambda kind, configuration: kind == "labels"
)

STUDENT, SECOND = {"student"}, {"second"}
# Term -> the networks that it trains.
DEFAULTS = {
    name.removeprefix("nnUNetTrainer"): {term: set(networks) for term, networks in trainer.terms.items()}
    for name, trainer in TRAINERS.items()
}
CONSISTENCY = {"supervised": STUDENT, "consistency": STUDENT}
PSEUDO = {"supervised": STUDENT, "pseudo": STUDENT}
MIXED = dict.fromkeys(("mixed_out", "mixed_in"), STUDENT)
BY_ORIGIN = dict.fromkeys(("mixed_labels_out", "mixed_pseudo_out", "mixed_labels_in", "mixed_pseudo_in"), STUDENT)
HEADS, BOTH = {"heads"}, {"student", "heads"}
# Settings that change what trains what.
TERMS = {
    # What the classes state, but for the one whose default confidence leaves nothing at the start of a training.
    **{name: terms for name, terms in DEFAULTS.items() if name != "DualStream"},
    "CoraNet_consistency_weight=0.3": {**DEFAULTS["CoraNet"], "consistency": STUDENT},
    "CoraNet_all_heads=true_consistency_weight=0.3": {
        **DEFAULTS["CoraNet"],
        **dict.fromkeys(("conservative", "radical", "conservative_certain", "radical_certain"), HEADS),
        "consistency": BOTH,
    },
    "CoraNet_head_gradient=0.3": {**DEFAULTS["CoraNet"], **dict.fromkeys(("conservative", "radical"), BOTH)},
    "CoraNet_uncertainty=aleatoric": {"supervised": STUDENT, "certain": STUDENT, "aleatoric": HEADS},
    "MeanTeacherBURL_region_normalized=true": PSEUDO,
    "BCP_unmixed=false": MIXED,
    "BCP_unmixed=false_origin_normalized=true": BY_ORIGIN,
    "BCPBURL_unmixed=false": MIXED,
    "BCPBURL_unmixed=false_origin_normalized=true": BY_ORIGIN,
    "BCPBURL_unmixed=false_region_normalized=true": BY_ORIGIN,
    "DTML_supervision=both": {**DEFAULTS["DTML"], "distance": SECOND},
    "DualStream_mistake_weight=0.5_confidence=0.3": {
        **DEFAULTS["DualStream"],
        "mistake_first": STUDENT,
        "mistake_second": SECOND,
    },
}


PRETRAINED, RAMP = "_pretraining=0.25_min_recall=0_ramp_up=0.5", "_warm_up=0.25_ramp_up=0.5"
HALF_WAY = math.exp(-5 * (1 - 0.5) ** 2)
# The weights of terms half of the run in, in the middle of their ramp.
WEIGHTS = {
    f"MeanTeacher_consistency_weight=0.7{RAMP}": dict(supervised=1, consistency=0.7 * HALF_WAY),
    f"UAMT_consistency_weight=0.7{RAMP}": dict(supervised=1, consistency=0.7 * HALF_WAY),
    f"PiModel_consistency_weight=0.7{RAMP}": dict(supervised=1, consistency=0.7 * HALF_WAY),
    f"URPC_consistency_weight=0.7{RAMP}": dict(supervised=1, consistency=0.7 * HALF_WAY),
    f"EntropyMinimization_entropy_weight=0.7{RAMP}": dict(supervised=1, entropy=0.7 * HALF_WAY),
    f"CoraNet_certain_weight=0.7_consistency_weight=0.3{PRETRAINED}": dict(
        supervised=1, conservative=1, radical=1, certain=0.7 * HALF_WAY, consistency=0.3 * HALF_WAY
    ),
    f"MeanTeacherBURL_pseudo_weight=0.7{PRETRAINED}": dict(supervised=1, pseudo=0.7 * HALF_WAY),
    # The mean of two passes; in one loss, voxels have the weights.
    f"BCP_pseudo_weight=0.7{PRETRAINED}": dict(supervised=0.5, mixed=0.5),
    f"BCP_pseudo_weight=0.7_unmixed=false{PRETRAINED}": dict(mixed_out=0.5, mixed_in=0.5),
    f"BCP_pseudo_weight=0.7_unmixed=false_origin_normalized=true{PRETRAINED}": dict(
        mixed_labels_out=0.5,
        mixed_pseudo_out=0.35 * HALF_WAY,
        mixed_labels_in=0.5,
        mixed_pseudo_in=0.35 * HALF_WAY,
    ),
    f"BCPBURL_pseudo_weight=0.7_region_normalized=true{PRETRAINED}": dict(
        supervised=0.5, mixed_labels=0.5, mixed_pseudo=0.35 * HALF_WAY
    ),
    f"CutMix_pseudo_weight=0.7{PRETRAINED}": dict(supervised=1, mixed=0.7 * HALF_WAY),
    f"CPS_pseudo_weight=0.7{PRETRAINED}": dict(
        supervised=1, supervised_second=1, cross_first=0.7 * HALF_WAY, cross_second=0.7 * HALF_WAY
    ),
    # The consistency is the mean over labeled and unlabeled patches.
    f"DTML_consistency_weight=0.7_supervision=both{RAMP}": dict(
        supervised=1, mask=1, distance=1, consistency_labeled=0.35 * HALF_WAY, consistency=0.35 * HALF_WAY
    ),
    f"DTC_consistency_weight=0.7_distance_weight=0.3{RAMP}": dict(
        supervised=1, distance=0.3, consistency_labeled=0.35 * HALF_WAY, consistency=0.35 * HALF_WAY
    ),
    f"DualStream_pseudo_weight=0.7_disagreement_weight=0.3_contrast_weight=0.2{PRETRAINED}_mistake_weight=0.6": dict(
        supervised=1,
        supervised_second=1,
        mistake_first=0.6,
        mistake_second=0.6,
        pseudo_first=0.7 * HALF_WAY,
        pseudo_second=0.7 * HALF_WAY,
        disagreement=0.3 * HALF_WAY,
        contrast_first=0.2 * HALF_WAY,
        contrast_second=0.2 * HALF_WAY,
    ),
}


@pytest.mark.parametrize("name", TRAINERS)
def test_every_method_states_its_facts(name):
    trainer = TRAINERS[name]
    assert trainer.paper.citation and 1990 < trainer.paper.year < 2100
    assert trainer.idea and not trainer.idea.endswith(".") and not trainer.corrected.endswith(".")
    assert {"idea", "use_when"} <= set(vars(trainer)) and trainer.use_when and not trainer.use_when.endswith(".")
    assert trainer.labeled_by in ("student", "teacher", "second") and trainer.terms
    assert not find_trainer(f"{name}_{trainer.switched_off}").__dict__.get("chosen_schedule")


def half_way(trainer):
    """A trainer whose ramp began after a quarter of the run, before the step after half of it."""
    for share in (4, 2):
        trainer.global_step, trainer.current_epoch = trainer.total_steps // share, trainer.num_epochs // share
        trainer.before_step()
    return trainer


SCHEDULE = "_4epochs_num_iterations_per_epoch=2_num_val_iterations_per_epoch=1_seed=7"


@pytest.mark.parametrize("method", WEIGHTS)
def test_weights_of_the_terms_in_the_middle_of_the_ramp(started, method):
    trainer = half_way(started(f"nnUNetTrainer{method}{SCHEDULE}"))
    batch = next(trainer.dataloader_train)
    weights = {}
    for group in trainer.losses(batch["data"], batch["target"]):
        weights |= {name: term.weight for name, term in group.items()}
    assert weights == pytest.approx(WEIGHTS[method])


@pytest.mark.parametrize("method", ["BCP", "BCPBURL_labeled_regions=none_unlabeled_regions=none"])
def test_weights_of_voxels_in_the_middle_of_the_ramp(started, monkeypatch, method):
    trainer = half_way(started(f"nnUNetTrainer{method}_unmixed=false_pseudo_weight=0.7{PRETRAINED}{SCHEDULE}"))
    batch, seen = next(trainer.dataloader_train), []
    original = trainer.host_loss
    monkeypatch.setattr(trainer, "host_loss", lambda *args: seen.append(args[2]) or original(*args))
    list(trainer.losses(batch["data"], batch["target"]))
    assert len(seen) == 2
    for weights in seen:
        assert sorted(weights.unique().tolist()) == pytest.approx([0.7 * HALF_WAY, 1])


@pytest.mark.parametrize("kind, configuration", TWO_KINDS)
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
        original = trainer.targets
        trainer.targets = lambda unlabeled: original(unlabeled) | {"certain": torch.rand(batch["data"].shape) < 0.5}
    modules = {"student": trainer.network, **dict(trainer.companions)}
    reached = {}
    trainer._unlabeled_keys = []
    groups = [*trainer.losses(batch["data"], batch["target"])]
    if {term for group in groups for term in group} != set(TERMS[method]):
        # Terms that take turns.
        trainer.global_step += 1
        groups += trainer.losses(batch["data"], batch["target"])
    for group in groups:
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


@pytest.mark.parametrize("kind, configuration", TWO_KINDS)
@pytest.mark.parametrize("name", TRAINERS)
def test_every_trainer_makes_steps_with_five_stages(started, name, kind, configuration):
    trainer = started(short(name), kind, five_stages(configuration), fit=False)
    batch = next(trainer.dataloader_train)
    for network in trainer.networks.values():
        sizes = [output.shape[2:] for output in network(batch["data"])]
        assert len(sizes) == 4 and sizes == [scale.shape[2:] for scale in batch["target"][:4]]
    before = flat(trainer.network).clone()
    train_steps(trainer, 2)
    assert trainer._non_finite_total == 0
    assert torch.isfinite(flat(trainer.network)).all() and not torch.equal(flat(trainer.network), before)
    assert UNLABELED_TERMS & set(trainer._epoch_sums)


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
    train_steps(trainer, trainer.total_steps)
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


VANILLA = "MeanTeacher_consistency_weight=0"
# What switches a method's unlabeled half off, where its supervised part is nnU-Net's own.
OFF = [*(f"{name.removeprefix('nnUNetTrainer')}_{trainer.switched_off}" for name, trainer in TRAINERS.items())]
OFF.append("DTML_setting=segmentation")


@pytest.fixture(scope="module")
def vanilla():
    """By kind and configuration: the student after four steps of Mean Teacher with weight 0, which equals stock
    nnU-Net's."""
    return {}


KINDS = [("labels", "2d"), ("regions", "3d_fullres"), ("regions_ignore", "2d")]


@pytest.mark.parametrize("kind, configuration", slow_unless(KINDS, lambda kind, configuration: kind == "labels"))
@pytest.mark.parametrize("method", OFF)
def test_switched_off_the_student_trains_as_in_stock_nnunet(started, vanilla, method, kind, configuration):
    where = kind, configuration

    def train(method):
        trainer = started(f"nnUNetTrainer{method}{SHORT}", *where)
        train_steps(trainer, 4)
        return flat(trainer.network)

    where = where[0], fitting(f"nnUNetTrainer{method}", where[1])
    if where not in vanilla:
        vanilla[where] = train(VANILLA)
    assert torch.equal(train(method), vanilla[where])


def predict(folder: Path, image: np.ndarray, folds: tuple[int, ...] = (0,)) -> np.ndarray:
    """What nnU-Net's own predictor makes of a model folder."""
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False, use_mirroring=False)
    predictor.initialize_from_trained_model_folder(str(folder), use_folds=folds)
    return predictor.predict_single_npy_array(image[None], {"spacing": [1.0, 1.0, 1.0]}, None, None, True)


# Settings with another head or another network that predicts.
VARIANTS = ["nnUNetTrainerDTML_supervision=both", "nnUNetTrainerDTML_setting=distance_supervision=distance"]
WALKS = [(name, *where) for name in TRAINERS for where in EVERYWHERE]
WALKS += [(name, "labels", "2d") for name in VARIANTS]


# A training for each kind of data, among them of one network, two networks, and pretraining.
FAST_WALKS = [("MeanTeacher", "labels", "2d"), ("CPS", "labels", "3d_fullres"), ("BCP", "regions", "3d_fullres")]


@pytest.mark.parametrize(
    "name, kind, configuration",
    slow_unless(WALKS, lambda name, *where: (name.removeprefix("nnUNetTrainer"), *where) in FAST_WALKS),
)
def test_train_predict_export(prepared, work, tmp_path, monkeypatch, name, kind, configuration):
    from nnunetv2.training.logging.nnunet_logger import LocalLogger

    monkeypatch.setattr(LocalLogger, "plot_progress_png", lambda self, folder: None)
    trainer, configuration = short(name), fitting(name, configuration)
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

    own = dataset / f"{trainer}_second__nnUNetPlans_cpu__{configuration}"
    has_second = find_trainer(name).has_second_network() and "setting=distance" not in name
    # DualStream's has another architecture; with setting=distance, the network of the plans was not trained.
    assert own.exists() == (has_second and "DualStream" in name)
    assert (model / "fold_100").exists() == (exported / "fold_100").exists() == (has_second and not own.exists())
    if has_second:
        second = predict(own, image)[1] if own.exists() else predict(model, image, (100,))[1]
        assert np.isfinite(second).all() and not np.array_equal(second, probabilities)
        if own.exists():
            shutil.rmtree(own)
        elif kind == "labels":
            # nnU-Net averages the folds' logits.
            mean = np.sqrt(probabilities * second)
            both = predict(exported, image, (0, 100))[1]
            np.testing.assert_allclose(both, mean / mean.sum(0), atol=0.005)
    shutil.rmtree(model)


GATED = [("CoraNet", 0), ("MeanTeacherBURL", 0), ("BCP", 0), ("BCPBURL", 0), ("CPS", 0), ("CPS", 1), ("DualStream", 1)]


@pytest.mark.parametrize("method, worse", GATED)
def test_pretraining_goes_on_until_every_class_is_known_to_every_network(started, method, worse):
    trainer = started(f"nnUNetTrainer{method}_pretraining=0_min_recall=0.5_num_iterations_per_epoch=2_3epochs_seed=1")
    # An epoch without a class says nothing of it; before the first one with it, it is not known.
    trainer.on_train_epoch_end([{"loss": np.zeros(())}])
    assert not trainer.schedule.knows_classes
    for knows_core, expected in ((False, False), (True, True)):
        trainer.on_train_epoch_start()
        train_steps(trainer, 2)
        assert not UNLABELED_TERMS & set(trainer._epoch_sums)
        found, present = trainer.schedule.counts.unbind(1)
        assert (present > 0).all() and (found <= present).all() and torch.equal(present[0], present[-1])
        found.copy_(present)
        found[worse] *= torch.tensor([0.9, 0.6 if knows_core else 0.4])
        trainer.on_train_epoch_end([{"loss": np.zeros(())}])
        recall = {"ball": pytest.approx(0.9), "core": pytest.approx(0.6 if knows_core else 0.4)}
        assert trainer.schedule.state() == {"phase_2_start": None, "knows_classes": expected, "recall": recall}
        trainer.current_epoch += 1
    trainer.on_train_epoch_start()
    assert trainer.uses_unlabeled()
    train_steps(trainer, 1)
    assert trainer.schedule.phase_2_start == pytest.approx(4 / 6) and UNLABELED_TERMS & set(trainer._epoch_sums)


@pytest.mark.parametrize("pretraining, late", [(0.15, 3), (0.05, 2), (0.6, None)])
def test_a_late_phase_2_is_warned_of_once_and_its_epoch_is_logged(started, capsys, pretraining, late):
    trainer = started(f"nnUNetTrainerCPS_pretraining={pretraining}_10epochs_num_iterations_per_epoch=2_seed=1")
    warned = []
    capsys.readouterr()
    for epoch in range(10):
        trainer.current_epoch, trainer.global_step = epoch, 2 * epoch
        trainer.before_step()
        trainer.global_step += 2
        trainer.schedule.counts[:] = torch.tensor([[8.0, 2.0 if epoch < 8 else 8.0], [10.0, 10.0]])
        trainer.schedule.counts[1, 0, 1] -= 1
        trainer.schedule.end_epoch()
        printed = capsys.readouterr().out
        warned += [epoch + 1] if "WARNING: Phase 2 is late" in printed else []
        if warned == [epoch + 1]:
            assert f"after {10 * (epoch + 1)}% of the run, core has a recall of 0.100 on labeled data" in printed
            assert "nnunet_semiseg fork" in printed and "lower min_recall" in printed
        # A training that is continued does not warn again.
        trainer.schedule.load_state(trainer.schedule.state())
        assert ("Phase 2 begins at epoch 9: unlabeled data take part" in printed) == (epoch == 9)
    assert warned == ([late] if late else [])


@pytest.mark.parametrize("kind", ["labels", "ignore", "regions_ignore"])
@pytest.mark.parametrize("method", dict.fromkeys(method for method, _ in GATED))
def test_recall_is_what_the_networks_find_of_the_labels(started, method, kind):
    trainer = started(f"nnUNetTrainer{method}_pretraining=0_seed=1", kind)
    for network in (trainer.network, *trainer.companions.values()):
        perturb(network, 0.3)
    batch = next(trainer.dataloader_train)
    target, expected = batch["target"][0].numpy(), np.zeros((len(trainer.students), 2, 2))
    for index, network in enumerate(trainer.students):
        with torch.no_grad():
            logits = network(batch["data"])[0].numpy()
        for b, *v in np.ndindex(target.shape[0], *target.shape[2:]):
            values = [value[(b, slice(None), *v)] for value in (target, logits)]
            for k in (0, 1):
                if kind == "regions_ignore":
                    present, found = values[0][k] == 1 and values[0][2] == 0, values[1][k] > 0
                else:
                    present, found = values[0][0] == k + 1, values[1].argmax() == k + 1
                expected[index, 1, k] += present
                expected[index, 0, k] += present and found
    assert 0 < expected[:, 0].sum() < expected[:, 1].sum()
    list(trainer.losses(batch["data"], batch["target"]))
    assert np.array_equal(trainer.schedule.counts.numpy(), expected)
