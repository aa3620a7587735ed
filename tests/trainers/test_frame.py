"""The semi-supervised frame: what holds for every trainer."""

import csv
import json
import pickle
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import EVERYWHERE, SHORT, UNLABELED_TERMS, fitting, flat, from_start, short, slow_unless, train_steps
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_semiseg import checkpoints, cli
from nnunet_semiseg.data.randomness import seed_everything
from nnunet_semiseg.data.unlabeled import ForegroundLocations
from nnunet_semiseg.data.views import fix_transform_arithmetic
from nnunet_semiseg.networks.ema import unwrap
from nnunet_semiseg.trainers.frame import Term, Unlabeled
from nnunet_semiseg.trainers.frame.foreground import FOREGROUND_CASES_PER_EPOCH, FOREGROUND_VOXELS
from nnunet_semiseg.trainers.frame.step import MAX_NON_FINITE_STEPS
from nnunet_semiseg.trainers.registry import TRAINERS

TWO_KINDS = [("labels", "2d"), ("regions_ignore", "3d_fullres")]
ALL_KINDS = ["labels", "regions", "ignore", "regions_ignore"]


class SeededStockTrainer(nnUNetTrainer):
    """nnU-Net's trainer with the seed and the schedule of the tests, and nothing else."""

    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cuda")):  # noqa: B008
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 2, 3, 1

    def initialize(self):
        seed_everything(7)
        super().initialize()

    def on_train_start(self):
        super().on_train_start()
        fix_transform_arithmetic(self.dataloader_train.data_loader.transforms)


def stock_trainer(make_trainer, kind, configuration):
    plain = make_trainer("nnUNetTrainer", kind, configuration)
    kwargs = {**plain.my_init_kwargs}
    kwargs["plans"] = {**kwargs["plans"], "continue_training": False}
    return SeededStockTrainer(**kwargs)


@pytest.mark.parametrize(
    "kind, configuration",
    slow_unless(
        [("labels", "2d"), ("labels", "3d_fullres"), ("regions", "3d_fullres"), ("regions_ignore", "2d")],
        lambda kind, configuration: configuration == "2d",
    ),
)
def test_weight_zero_equals_stock_trainer_bit_for_bit(make_trainer, started, kind, configuration):
    ours = started(f"nnUNetTrainerMeanTeacher_consistency_weight=0{SHORT}", kind, configuration)
    train_steps(ours, 5)
    stock = stock_trainer(make_trainer, kind, configuration)
    stock.on_train_start()
    stock.on_train_epoch_start()
    train_steps(stock, 5)
    assert torch.equal(flat(ours.network), flat(stock.network))


def test_unlabeled_half_leaves_the_labeled_stream_alone(started):
    streams, weights = [], []
    same_plans = [name for name in TRAINERS if fitting(name, "2d") == "2d"]
    for name in (f"nnUNetTrainerMeanTeacher_consistency_weight=0{SHORT}", *map(short, same_plans)):
        trainer = started(name)
        batches = []
        for _ in range(3):
            batch = next(trainer.dataloader_train)
            batches.append(batch["data"].clone())
            trainer.train_step(batch)
        streams.append(torch.cat(batches))
        weights.append(flat(trainer.network))
    for stream, network in zip(streams[1:], weights[1:]):
        assert torch.equal(stream, streams[0])
        assert not torch.equal(network, weights[0])


@pytest.mark.parametrize("name", TRAINERS)
@pytest.mark.parametrize(
    "kind, configuration",
    slow_unless(product(ALL_KINDS, ("2d", "3d_fullres")), lambda *where: where in TWO_KINDS),
)
def test_every_trainer_learns_from_both_halves(started, name, kind, configuration):
    trainer = started(short(name), kind, configuration)
    before = flat(trainer.network).clone()
    train_steps(trainer, 3)
    assert trainer._non_finite_total == 0
    assert torch.isfinite(flat(trainer.network)).all()
    assert not torch.equal(before, flat(trainer.network))
    assert UNLABELED_TERMS & set(trainer._epoch_sums) and trainer._unlabeled_keys
    assert trainer.global_step == 3


def test_teacher_sees_clamped_noise(started):
    trainer = started("nnUNetTrainerMeanTeacher_warm_up=0_noise=0.5_student_view=weak" + SHORT)
    seen = {}
    trainer.teacher.forward = lambda x: seen.setdefault("teacher", x) * trainer.network(x)[0][:, :1]
    x = torch.zeros(2, 1, *trainer.configuration_manager.patch_size)
    trainer.targets(Unlabeled(weak=x, strong=x + 1))
    noise = seen["teacher"]
    assert noise.abs().max() == 1.0
    assert 0.4 < float(noise.std()) < 0.5
    assert (noise == 1.0).float().mean() == pytest.approx(0.0228, abs=0.01)


@pytest.mark.parametrize("name", TRAINERS)
def test_backward_passes_of_a_step_add_up_to_one_over_all_terms(started, name):
    weights = []
    for joint in (False, True):
        trainer = started(f"{from_start(name)}{SHORT}")
        if joint:
            parts, step = [], trainer._optimizer_step
            trainer._backward = parts.append

            def after_one_backward(parts=parts, step=step):
                sum(parts).backward()
                parts.clear()
                return step()

            trainer._optimizer_step = after_one_backward
        train_steps(trainer, 2)
        weights.append(flat(trainer.network))
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "kind, configuration",
    slow_unless(TWO_KINDS, lambda kind, configuration: kind == "labels"),
)
@pytest.mark.parametrize("name", [*TRAINERS, "nnUNetTrainerDTML_supervision=both"])
def test_hidden_labels_change_nothing(started, name, kind, configuration, prepared, work):
    """Sentinels in the hidden cases' segmentations and class locations: same batches, same weights."""
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

    folder = work / "preprocessed" / prepared(kind) / f"nnUNetPlans_cpu_{configuration}"

    def run():
        trainer = started(f"{from_start(name)}_num_iterations_per_epoch=6_seed=7", kind, configuration)
        assert {"lab_03", "lab_04"} <= set(trainer.dataloader_unlabeled.data_loader._data.identifiers)
        keys, batches = set(), []
        original = trainer.draw_unlabeled

        def draw():
            batch = original()
            keys.update(batch["keys"])
            batches.append(batch["strong"].clone())
            return batch

        trainer.draw_unlabeled = draw
        train_steps(trainer, 6)
        return flat(trainer.network), torch.cat(batches), keys

    honest = run()
    assert honest[2] & {"lab_03", "lab_04"}
    originals = {}
    try:
        for case in ("lab_03", "lab_04"):
            for suffix in (".b2nd", "_seg.b2nd", ".pkl"):
                originals[case + suffix] = (folder / (case + suffix)).read_bytes()
            data, segmentation, _, properties = nnUNetDatasetBlosc2(str(folder)).load_case(case)
            data, segmentation = data[:], np.full_like(segmentation[:], 999)
            locations = dict.fromkeys(properties["class_locations"], np.zeros((1, 4), int))
            for suffix in (".b2nd", "_seg.b2nd", ".pkl"):
                (folder / (case + suffix)).unlink()
            nnUNetDatasetBlosc2.save_case(
                data,
                segmentation,
                {**properties, "class_locations": locations},
                str(folder / case),
                chunks=data.shape,
                blocks=data.shape,
            )
        sentinel = run()
    finally:
        for file, content in originals.items():
            (folder / file).write_bytes(content)
    assert torch.equal(honest[1], sentinel[1])
    assert torch.equal(honest[0], sentinel[0])


class Killed(BaseException):
    pass


def run_until(trainer, epoch):
    """Train, and stop as hard as a signal would at the start of an epoch."""
    original = trainer.on_epoch_start

    def stop():
        if trainer.current_epoch == epoch:
            raise Killed
        original()

    trainer.on_epoch_start = stop
    with pytest.raises(Killed):
        trainer.run_training()


def state_of(trainer):
    return {
        "student": trainer.network.state_dict(),
        "companions": trainer.companions.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "log": {k: v for k, v in trainer.logger.local_logger.my_fantastic_logging.items() if "timestamp" not in k},
        "step": trainer.global_step,
        "schedule": trainer.schedule.state(),
        "method": trainer.method_state(),
        "unlabeled random": trainer.random_stream.state(),
        "global random": (torch.get_rng_state(), np.random.get_state()[1]),
    }


def assert_same(a, b, where=""):
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{where}/{i}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        np.testing.assert_array_equal(a, b, err_msg=where)


# One of each kind: a teacher, heads and a pool, two phases and boxes, two networks.
IN_SHORT = [f"nnUNetTrainer{method}" for method in ("MeanTeacher", "CoraNet", "CutMix", "CPS")]
RESTARTS = [
    *((name, *where) for name in TRAINERS for where in EVERYWHERE),
    *((f"{from_start(name)}_mixing=both_turns=true_strong_view=strong", "regions_ignore", "2d") for name in TRAINERS),
    ("nnUNetTrainerMeanTeacher_predict_with=teacher_unlabeled_foreground_sampling=0.5_warm_up=0", "labels", "2d"),
    ("nnUNetTrainerCoraNet_preset=code_pretraining=0.4", "labels", "2d"),
    ("nnUNetTrainerDTML_supervision=both_warm_up=0", "labels", "2d"),
    # Killed before the classes are known, and known then without having been looked for again.
    *((f"nnUNetTrainer{name}_pretraining=0", "labels", "2d") for name in ("BCP", "CPS", "CoraNet")),
    ("nnUNetTrainerBCP_pretraining=0.5_min_recall=0.001", "labels", "2d"),
    ("nnUNetTrainerDTML_setting=distance_supervision=distance", "labels", "2d"),
]


@pytest.mark.parametrize(
    "name, kind, configuration",
    slow_unless(RESTARTS, lambda name, *where: name in IN_SHORT and where == ("labels", "2d")),
)
def test_restart_continues_bit_for_bit(make_trainer, name, kind, configuration):
    name = name + SHORT if name not in TRAINERS else short(name)
    whole = make_trainer(name, kind, configuration)
    whole.run_training()
    expected = state_of(whole)

    run_until(make_trainer(name, kind, configuration), epoch=1)
    resumed = make_trainer(name, kind, configuration, continue_training=True)
    latest = Path(resumed.output_folder) / "checkpoint_latest.pth"
    resumed.load_checkpoint(str(latest))
    assert resumed.current_epoch == 1
    resumed.run_training()
    assert_same(expected, state_of(resumed))
    assert not latest.exists()
    assert (Path(resumed.output_folder) / "checkpoint_final.pth").is_file()


@pytest.mark.parametrize("name", ["nnUNetTrainerBCP", "nnUNetTrainerMeanTeacher"])
def test_a_checkpoint_without_a_schedule_continues_and_restarts(make_trainer, name):
    """As version 0.1.0 wrote it: the state of two phases was the method's."""
    whole = make_trainer(short(name))
    whole.run_training()
    run_until(make_trainer(short(name)), epoch=1)
    resumed = make_trainer(short(name), continue_training=True)
    latest = Path(resumed.output_folder) / "checkpoint_latest.pth"
    checkpoint = checkpoints.read(latest)
    state = checkpoint[checkpoints.STATE_KEY]
    state["method"] = state.pop("schedule")
    del state["of_this_run"], state["optimizers"]
    checkpoints.write(checkpoint, latest)
    checkpoints.write(checkpoints.restarted(checkpoint), latest.with_name("restarted.pth"))
    again = make_trainer(short(name))
    again.load_checkpoint(str(latest.with_name("restarted.pth")))
    assert again.current_epoch == 0 and again.schedule.state().get("phase_2_start") is None
    resumed.load_checkpoint(str(latest))
    resumed.run_training()
    assert_same(state_of(whole), state_of(resumed))


@pytest.mark.parametrize("name", TRAINERS)
def test_checkpoint_is_a_plain_one_with_our_state_beside(make_trainer, name):
    trainer = make_trainer(short(name))
    run_until(trainer, epoch=1)
    checkpoint = checkpoints.read(Path(trainer.output_folder) / "checkpoint_latest.pth")
    plain = nnUNetTrainer.build_network_architecture(
        trainer.plans_manager, trainer.configuration_manager, 1, trainer.label_manager.num_segmentation_heads, False
    )
    plain.load_state_dict(checkpoint["network_weights"], strict=True)
    state = checkpoint["semiseg_state"]
    assert set(state["companions"]) == set(trainer.companions.state_dict())
    by_teacher = {f"nnUNetTrainer{method}" for method in ("CoraNet", "CutMix", "MutualMeanTeacher")}
    assert state["predicts"] == ("teacher" if name in by_teacher else "student")
    assert state["options"]["seed"] == 7


def test_predict_with_teacher_puts_the_teacher_into_network_weights(make_trainer):
    trainer = make_trainer("nnUNetTrainerMeanTeacher_predict_with=teacher" + SHORT)
    run_until(trainer, epoch=1)
    for file in ("checkpoint_latest.pth", "checkpoint_best.pth"):
        checkpoint = checkpoints.read(Path(trainer.output_folder) / file)
        for key, value in trainer.teacher.module.state_dict().items():
            assert torch.equal(checkpoint["network_weights"][key], value)
        assert torch.equal(
            checkpoint["semiseg_state"]["student"]["decoder.seg_layers.0.weight"],
            trainer.network.decoder.seg_layers[0].weight,
        )
        assert checkpoint["semiseg_state"]["predicts"] == "teacher"
    assert trainer.predicting_network() is trainer.teacher.module


def test_non_finite_term_skips_the_step_and_many_abort_with_the_cases(started):
    trainer = started(short("nnUNetTrainerMeanTeacher"))
    train_steps(trainer, 1)
    before = flat(trainer.network).clone(), flat(trainer.teacher).clone()
    poison = Term(torch.tensor(float("nan")), 1.0)
    original = trainer.student_losses
    trainer.student_losses = lambda **given: ({**group, "poison": poison} for group in original(**given))
    train_steps(trainer, MAX_NON_FINITE_STEPS - 1)
    assert torch.equal(before[0], flat(trainer.network)) and torch.equal(before[1], flat(trainer.teacher))
    assert trainer._non_finite_total == MAX_NON_FINITE_STEPS - 1
    with pytest.raises(RuntimeError, match=r"poison.*lab_0\d.*(unl|lab)_0\d"):
        train_steps(trainer, 1)


def test_gradient_that_is_not_finite_skips_the_step_too(started):
    trainer = started(short("nnUNetTrainerMeanTeacher"))
    train_steps(trainer, 1)
    before = flat(trainer.network).clone()
    original = trainer.student_losses

    def poisoned(**given):
        (terms,) = original(**given)
        # Finite, with an infinite slope.
        weight = next(trainer.network.parameters())
        yield {**terms, "steep": Term(torch.sqrt((weight - weight.detach()).square().sum()), 1.0)}

    trainer.student_losses = poisoned
    result = trainer.train_step(next(trainer.dataloader_train))
    assert torch.equal(before, flat(trainer.network)) and trainer._non_finite_total == 1
    assert np.isfinite(result["loss"])


def test_log_csv_and_figure_have_every_epoch(make_trainer):
    trainer = make_trainer(short("nnUNetTrainerCoraNet"))
    trainer.run_training()
    folder = Path(trainer.output_folder)
    rows = list(csv.DictReader((folder / "progress_semiseg.csv").open()))
    assert [row["epoch"] for row in rows] == ["0", "1"]
    wanted = {
        "supervised",
        "conservative",
        "radical",
        "certain",
        "certain_weight",
        "certain_voxels",
        "student_val_dice",
        "teacher_val_dice",
        "non_finite_steps",
    }
    assert wanted <= set(rows[0])
    assert 0 <= float(rows[1]["certain_voxels"]) <= 1
    assert (folder / "progress_semiseg.png").stat().st_size > 5000
    log = Path(trainer.log_file).read_text()
    assert "Semi-supervised: supervised" in log and "The teacher predicts" in log
    logged = trainer.logger.local_logger.my_fantastic_logging
    assert len(logged["semiseg/certain"]) == len(logged["train_losses"]) == 2


def test_terms_go_to_nnunets_other_loggers(make_trainer):
    trainer = make_trainer(short("nnUNetTrainerMeanTeacher"))
    seen = []

    class Other:
        def update_config(self, config): ...
        def log_summary(self, key, value): ...
        def log(self, key, value, step):
            seen.append((key, step))

    trainer.logger.loggers.append(Other())
    trainer.run_training()
    assert {("semiseg/consistency", 0), ("semiseg/teacher_val_dice", 1)} <= set(seen)


def test_validation_dice_is_of_the_network_that_predicts(started):
    trainer = started("nnUNetTrainerMeanTeacher_predict_with=teacher" + SHORT, "regions_ignore")
    train_steps(trainer, 2)
    trainer.on_validation_epoch_start()
    with torch.no_grad():
        batch = next(trainer.dataloader_val)
        target = [t.clone() for t in batch["target"]]
        output = trainer.validation_step(batch)
        assert all(torch.equal(a, b) for a, b in zip(target, batch["target"]))
        with trainer._as_network(trainer.teacher.module):
            expected = nnUNetTrainer.validation_step(trainer, batch)
    assert np.array_equal(output["tp_hard"], expected["tp_hard"])
    assert "student_tp_hard" in output


def test_foreground_sampling_centers_crops_on_predicted_foreground(started):
    trainer = started("nnUNetTrainerMeanTeacher_warm_up=0_unlabeled_foreground_sampling=1" + SHORT)
    dataset = trainer.dataloader_unlabeled.data_loader._data
    assert trainer.foreground_locations, "filled at the start of the epoch"
    for case in dataset.identifiers:
        # Claim that the network saw foreground in one voxel only.
        trainer.foreground_locations[case] = {1: np.array([[0, 8, 12, 11]], dtype=np.int32)}
    dataset.locations.write(trainer.foreground_locations)
    loader = trainer.dataloader_unlabeled.data_loader
    for case in dataset.identifiers[:3]:
        data, _, _, properties = dataset.load_case(case)
        lower, upper = loader.get_bbox(data.shape[1:], True, properties["class_locations"])
        assert all(low <= voxel < up for low, voxel, up in zip(lower[1:], (12, 11), upper[1:]))
    assert loader.oversample_foreground_percent == 1


def test_foreground_locations_are_what_the_network_predicts(started):
    trainer = started("nnUNetTrainerMeanTeacher_warm_up=0_unlabeled_foreground_sampling=1" + SHORT)
    with torch.no_grad():
        # A network that calls everything class 2.
        trainer.network.decoder.seg_layers[-1].weight.zero_()
        trainer.network.decoder.seg_layers[-1].bias.copy_(torch.tensor([0.0, 0.0, 1.0]))
    trainer._refresh_foreground_locations()
    assert trainer.foreground_locations
    for by_class in trainer.foreground_locations.values():
        assert set(by_class) == {2}
        assert by_class[2].shape[1] == 4 and not by_class[2][:, 0].any()


def test_cascade_is_refused_at_start_with_the_way_out(make_trainer, prepared, work):
    file = work / "preprocessed" / prepared("labels") / "nnUNetPlans_cpu.json"
    original = file.read_text()
    plans = json.loads(original)
    plans["configurations"]["3d_lowres"] = {"inherits_from": "3d_fullres", "next_stage": "3d_cascade_fullres"}
    plans["configurations"]["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    file.write_text(json.dumps(plans))
    try:
        with pytest.raises(NotImplementedError, match="3d_lowres or 3d_fullres"):
            make_trainer("nnUNetTrainerMeanTeacher", configuration="3d_cascade_fullres")
    finally:
        file.write_text(original)


def test_all_as_fold_trains_where_no_fold_hides_labels(started, splits):
    splits([{"train": ["lab_00", "lab_01"], "val": ["lab_02"]}])
    trainer = started(short("nnUNetTrainerMeanTeacher"), fold="all")
    assert trainer.dataloader_unlabeled.data_loader._data.identifiers == [f"unl_{i:02d}" for i in range(4)]
    train_steps(trainer, 1)


def test_residual_encoder_plans(started, make_trainer, prepared, work):
    """CoraNet's heads read the features of a ResEnc U-Net as well."""
    file = work / "preprocessed" / prepared("labels") / "nnUNetPlans_cpu.json"
    original = file.read_text()
    plans = json.loads(original)
    architecture = plans["configurations"]["2d"]["architecture"]
    architecture["network_class_name"] = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
    architecture["arch_kwargs"]["n_blocks_per_stage"] = architecture["arch_kwargs"].pop("n_conv_per_stage")
    file.write_text(json.dumps(plans))
    try:
        trainer = started(short("nnUNetTrainerCoraNet"))
        assert type(unwrap(trainer.network)).__name__ == "ResidualEncoderUNet"
        train_steps(trainer, 2)
    finally:
        file.write_text(original)


def test_3d_lowres_trains(started, prepared, work):
    from nnunetv2.experiment_planning.plan_and_preprocess_api import preprocess_dataset

    dataset = prepared("labels")
    file = work / "preprocessed" / dataset / "nnUNetPlans_cpu.json"
    original = file.read_text()
    plans = json.loads(original)
    low = {**plans["configurations"]["3d_fullres"], "data_identifier": "nnUNetPlans_cpu_3d_lowres"}
    plans["configurations"]["3d_lowres"] = {**low, "spacing": [1.5, 1.5, 1.5], "patch_size": [8, 16, 16]}
    file.write_text(json.dumps(plans))
    try:
        preprocess_dataset(801, "nnUNetPlans_cpu", ("3d_lowres",), (1,), show_progress_bar=False)
        assert cli.main(["preprocess", "-d", "801", "-p", "nnUNetPlans_cpu", "-c", "3d_lowres", "-np", "1"]) == 0
        trainer = started(short("nnUNetTrainerMeanTeacher"), "labels", "3d_lowres")
        shape = trainer.dataloader_unlabeled.data_loader._data.load_case("unl_00")[0].shape
        assert shape == (1, 11, 17, 16)
        train_steps(trainer, 2)
        assert "consistency" in trainer._epoch_sums
    finally:
        file.write_text(original)


def test_an_initialized_trainer_has_no_unpicklable_options(make_trainer):
    trainer = make_trainer(short("nnUNetTrainerCoraNet"))
    assert pickle.loads(pickle.dumps(trainer.options)) == trainer.options


@pytest.mark.parametrize(
    "name", slow_unless([(name,) for name in TRAINERS], lambda name: name.endswith(("BCP", "CPS")))
)
def test_compiled_networks_train_and_leave_plain_weights(make_trainer, monkeypatch, name):
    """nnU-Net compiles on CUDA only; here it is made to, with a compiler that keeps the operations as they are."""
    from functools import partial

    from torch._dynamo import OptimizedModule

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    trainer = make_trainer(short(name))
    trainer._do_i_compile = lambda: True
    run_until(trainer, epoch=1)
    for network in (trainer.network, getattr(trainer, "teacher_network", None), getattr(trainer, "second", None)):
        assert network is None or isinstance(network, OptimizedModule)
    assert trainer._non_finite_total == 0
    checkpoint = checkpoints.read(Path(trainer.output_folder) / "checkpoint_latest.pth")
    keys = [*checkpoint["network_weights"], *checkpoint["semiseg_state"]["companions"]]
    assert not [key for key in keys if "_orig_mod" in key]
    plain = make_trainer(short(name), continue_training=True)
    plain.load_checkpoint(str(Path(trainer.output_folder) / "checkpoint_latest.pth"))
    assert torch.equal(flat(plain.network), flat(trainer.network))


def batches_of(trainer, count):
    """Cases and voxels of the next batches of the three loaders."""
    drawn = {}
    for name in ("train", "val", "unlabeled"):
        batches = [next(getattr(trainer, f"dataloader_{name}")) for _ in range(count)]
        voxels = torch.stack([torch.cat([b["weak"], b["strong"]]) if "weak" in b else b["data"] for b in batches])
        drawn[name] = [list(map(str, b["keys"])) for b in batches], voxels
    return drawn


def test_a_seed_repeats_the_batches_of_augmentation_processes(started, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "2")
    runs = []
    for seed, epoch in ((5, 0), (5, 0), (6, 0), (5, 1)):
        trainer = started(f"nnUNetTrainerBCP_seed={seed}")
        if epoch:
            # As after a restart.
            trainer.on_train_end()
            trainer.current_epoch = epoch
            trainer.on_train_start()
        runs.append(batches_of(trainer, 5))
        trainer.on_train_end()
    first, same, other_seed, restarted = runs
    other_method = started("nnUNetTrainerMeanTeacher_seed=5")
    assert torch.equal(batches_of(other_method, 5)["train"][1], first["train"][1])
    other_method.on_train_end()
    for name, (keys, voxels) in first.items():
        assert same[name][0] == keys and torch.equal(same[name][1], voxels), name
        assert len({batch.sum().item() for batch in voxels}) == len(voxels), "a process repeats another's batches"
        for others in (other_seed, restarted):
            assert not torch.equal(others[name][1], voxels), name


@pytest.mark.parametrize("name", ["nnUNetTrainerCPS", "nnUNetTrainerMeanTeacher", "nnUNetTrainerDualStream"])
def test_pretrained_weights_reach_every_network(make_trainer, name, tmp_path, capsys):
    source = make_trainer("nnUNetTrainerMeanTeacher")
    source.initialize()
    torch.save({"network_weights": source.network.state_dict()}, tmp_path / "pretrained.pth")
    trainer = make_trainer(name + SHORT)
    trainer.initialize()
    others = [network for other, network in trainer.networks.items() if other != "student"]
    untouched = [flat(network) for network in others]
    load_pretrained_weights(trainer.network, tmp_path / "pretrained.pth")
    trainer.on_train_start()
    printed = capsys.readouterr().out
    given = source.network.state_dict()
    if "DualStream" in name:
        assert "reach the first network only: the second has another architecture" in printed
        assert torch.equal(flat(others[0]), untouched[0])
        return
    for key, value in others[0].state_dict().items():
        # nnU-Net leaves the segmentation layers as they were initialized; all biases start at 0.
        if not key.endswith(".bias"):
            assert torch.equal(value, given[key]) == (".seg_layers." not in key), key
    assert ("both networks start from them" in printed) == ("CPS" in name)


def test_networks_of_an_ordinary_start_stay_as_they_were_initialized(make_trainer, capsys):
    trainer = make_trainer(f"nnUNetTrainerCPS{SHORT}")
    trainer.initialize()
    before = flat(trainer.companions["second"])
    trainer.on_train_start()
    assert torch.equal(flat(trainer.companions["second"]), before)
    assert "pretrained" not in capsys.readouterr().out


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_half_batches(started, configuration):
    whole = started(short("nnUNetTrainerCutMix"), configuration=configuration).batch_size
    trainer = started(short("nnUNetTrainerCutMix_half_batches=true"), configuration=configuration)
    labeled, unlabeled = next(trainer.dataloader_train), trainer.next_unlabeled()
    assert whole > 1 and len(labeled["data"]) == len(unlabeled.weak) == (whole + 1) // 2
    train_steps(trainer, 1)
    assert trainer._non_finite_total == 0


def test_predicted_foreground_stays_small(make_trainer, tmp_path):
    """13 classes in 2000 cases, as in FLARE22."""
    trainer = make_trainer("nnUNetTrainerBCP")
    for start in range(0, 2000, FOREGROUND_CASES_PER_EPOCH):
        trainer._remember_foreground(
            {
                f"case_{i:04d}": {k: np.full((FOREGROUND_VOXELS, 4), i, np.int32) for k in range(1, 14)}
                for i in range(start, start + FOREGROUND_CASES_PER_EPOCH)
            }
        )
    # A case that is predicted again is the latest.
    trainer._remember_foreground({"case_1990": {}})
    latest = [f"case_{i:04d}" for i in range(1800, 2000) if i != 1990] + ["case_1990"]
    assert list(trainer.foreground_locations) == latest
    locations = ForegroundLocations(tmp_path / "foreground.npz")
    locations.write(trainer.foreground_locations)
    assert locations.file.stat().st_size < 4e6
    torch.save(
        {case: {k: torch.from_numpy(v) for k, v in by.items()} for case, by in trainer.foreground_locations.items()},
        tmp_path / "state.pth",
    )
    assert (tmp_path / "state.pth").stat().st_size < 6e6


def test_locations_come_back_from_the_file(tmp_path):
    locations = ForegroundLocations(tmp_path / "foreground.npz")
    assert locations.of("first") == {}
    random = np.random.RandomState(0)
    voxels = lambda n: np.pad(random.randint(0, 99, (n, 3)), ((0, 0), (1, 0))).astype(np.int32)  # noqa: E731
    known = {"last": {2: voxels(3)}, "empty": {}, "first": {1: voxels(5), 3: voxels(1)}}
    locations.write(known)
    for case, by_class in known.items():
        assert locations.of(case).keys() == by_class.keys()
        for k, expected in by_class.items():
            assert np.array_equal(locations.of(case)[k], expected)
            assert locations.of(case)[k].dtype == np.int32
    locations.write({})
    assert locations.of("last") == {}


@pytest.mark.parametrize("largest, expected", [("true", {3}), ("false", {0, 3})])
def test_patches_are_centered_on_the_largest_component_in_3d(make_trainer, largest, expected):
    trainer = make_trainer(f"nnUNetTrainerBCP_largest_component={largest}")
    hard = torch.zeros(1, 1, 8, 12, 12, dtype=torch.int64)
    # Larger in its slice than any slice of the other, smaller in 3D.
    hard[0, 0, 0, :4, :4] = 1
    hard[0, 0, 3:, 8:11, 8:11] = 1
    first_slices = {z if z == 0 else 3 for z in trainer.foreground_of(hard).nonzero()[:, 2].tolist()}
    assert first_slices == expected
