"""``nnunet_semiseg fork``: which networks get the model's weights, when phase 2 begins, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import SHORT, TWO_PHASES, UNLABELED_TERMS, flat, train_steps
from nnunetv2.run.run_training import maybe_load_checkpoint

from nnunet_semiseg import checkpoints, cli
from nnunet_semiseg.trainers.frame.second_network import first_fold, second_fold

# No other test trains with this seed.
OWN = SHORT.replace("_seed=7", "_seed=70")
SOURCE = "nnUNetTrainer" + OWN


@pytest.fixture
def results(prepared, work):
    """The results of the data set that the tests fork in; what they add is removed."""
    folder = work / "results" / prepared("labels")
    before = set(folder.glob("*"))
    yield folder
    for new in set(folder.glob("*")) - before:
        shutil.rmtree(new)


@pytest.fixture
def model(make_trainer, results):
    """``model(dice=..., name=..., ...)``: the final checkpoint of a trained network, whose weights are all its own."""

    def save(dice=(0.9, 0.8), name=SOURCE, **where):
        trainer = make_trainer(name, **where)
        trainer.initialize()
        with torch.no_grad():
            for parameter in trainer.network.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        trainer.logger.local_logger.my_fantastic_logging["dice_per_class_or_region"] = [list(dice)]
        file = Path(trainer.output_folder) / "checkpoint_final.pth"
        trainer.save_checkpoint(str(file))
        return file

    return save


def fork(trainer, *models, fold=0, kind="801"):
    command = ["fork", "-d", kind, "-c", "2d", "-f", str(fold), "-tr", trainer, "-p", "nnUNetPlans_cpu", "--from"]
    return cli.main([*command, *map(str, models)])


@pytest.fixture
def continued(make_trainer):
    """``continued(name)``: what ``nnUNetv2_train ... --c`` has before it runs."""

    def load(name, **where):
        trainer = make_trainer(name, continue_training=True, **where)
        maybe_load_checkpoint(trainer, True, False)
        return trainer

    return load


def same(network, weights, but=()):
    """Whether a network has given weights, but for layers whose names contain one of ``but``."""
    own = network.state_dict()
    kept = [key for key in own if not any(part in key for part in but)]
    return all(torch.equal(own[key], weights[key]) for key in kept)


def begin(trainer):
    trainer.on_train_start()
    trainer.on_train_epoch_start()


@pytest.mark.parametrize("method", ["CutMix", "BCP", "MeanTeacher_predict_with=teacher"])
def test_student_and_teacher_are_the_model_and_phase_2_begins_at_once(model, continued, method, results, capsys):
    source, name = model(), f"nnUNetTrainer{method}{OWN}"
    weights = checkpoints.read(source)["network_weights"]
    # A fold's folder is as good as its checkpoint.
    assert fork(name, source.parent) == 0
    assert f"Train: nnUNetv2_train Dataset801_labels 2d 0 -tr {name} -p nnUNetPlans_cpu --c" in capsys.readouterr().out
    (file,) = (results / f"{name}__nnUNetPlans_cpu__2d" / "fold_0").glob("*.pth")
    assert file.name == "checkpoint_latest.pth"
    checkpoint = checkpoints.read(file)
    assert all(torch.equal(checkpoint["network_weights"][key], value) for key, value in weights.items())
    assert checkpoint["semiseg_state"]["trained_on"] == ["lab_00", "lab_01", "lab_02"]
    trainer = continued(name)
    assert trainer.current_epoch == 0 and trainer.options.seed == 70
    assert all(same(network, weights) for network in trainer.networks.values()) and len(trainer.networks) == 2
    begin(trainer)
    train_steps(trainer, 1)
    assert UNLABELED_TERMS & set(trainer._epoch_sums)
    log = "".join(file.read_text() for file in Path(trainer.output_folder).glob("training_log*"))
    assert f"Starts from {source}" in log
    if method != "MeanTeacher_predict_with=teacher":
        assert (
            "The run starts without pretraining" in log
            and "waits for" not in log
            and "Phase 2 begins at epoch 0" in log
        )


def test_a_forked_training_runs_and_restarts_as_any_other(model, make_trainer, continued):
    name = f"nnUNetTrainerCutMix{OWN}"
    assert fork(name, model()) == 0
    trainer = continued(name)
    trainer.run_training()
    assert trainer.current_epoch == 2 and "mixed" in trainer._epoch_sums
    final = checkpoints.read(Path(trainer.output_folder) / "checkpoint_final.pth")
    # A training that starts from this one has a phase 1 of its own.
    assert final["semiseg_state"]["schedule"]["forked"]
    assert "forked" not in checkpoints.restarted(final)["semiseg_state"]["schedule"]


def test_a_fork_draws_what_a_new_training_draws(model, make_trainer, continued):
    """So that methods which start from one model see the same labeled batches."""
    source, batches = model(), []
    for name in (f"nnUNetTrainerCutMix{OWN}", f"nnUNetTrainer_weight_decay=0{OWN}"):
        assert fork(name, source) == 0
        trainer = continued(name)
        trainer.on_train_start()
        batches.append(next(trainer.dataloader_train))
    assert torch.equal(batches[0]["data"], batches[1]["data"])


def test_nnunets_own_trainer_goes_on_from_the_whole_model(model, continued):
    source, name = model(), f"nnUNetTrainer_weight_decay=0{OWN}"
    assert fork(name, source) == 0
    trainer = continued(name)
    assert trainer.current_epoch == 0 and same(trainer.network, checkpoints.read(source)["network_weights"])
    trainer.run_training()


def test_two_networks_start_from_two_models(model, continued):
    sources = [model(), model(name=SOURCE + "_weight_decay=0")]
    name = f"nnUNetTrainerCPS{OWN}"
    assert fork(name, *sources) == 0
    trainer = continued(name)
    for network, source in zip(trainer.students, sources):
        assert same(network, checkpoints.read(source)["network_weights"])
    assert trainer.schedule.knows_classes and trainer.uses_unlabeled()


@pytest.mark.parametrize("method", ["CPS", "MutualMeanTeacher"])
def test_two_networks_from_one_model_come_apart(model, continued, method, capsys):
    source, name = model(), f"nnUNetTrainer{method}_min_recall=0.2{OWN}"
    weights = checkpoints.read(source)["network_weights"]
    assert fork(name, source) == 0
    printed = capsys.readouterr().out
    assert "--from: both networks start from them" in printed
    assert (
        "phase 2 waits for min_recall 0.2, because the model lacks the second network's segmentation layers" in printed
    )
    trainer = continued(name)
    first, second = trainer.network, trainer.companions["second"]
    assert same(first, weights) and same(second, weights, but=["seg_layers"]) and not same(second, weights)
    # Phase 1 lasts until the second network finds every class, however short pretraining is.
    assert not trainer.uses_unlabeled() and trainer.schedule.pretraining == 0
    trainer.schedule.knows_classes = True
    begin(trainer)
    apart = []
    encoder = lambda network: flat(network.encoder)  # noqa: E731
    for _ in range(3):
        train_steps(trainer, 1)
        apart.append((encoder(first) - encoder(second)).abs().max().item())
    assert 0 < apart[0] < apart[-1]


def test_a_second_network_of_another_architecture_needs_a_model_of_its_own(model, continued, results, capsys):
    name = f"nnUNetTrainerDualStream{OWN}"
    source = model()
    assert fork(name, source) == 0
    printed = capsys.readouterr().out
    assert "WARNING: --from reach the first network only: the second has another architecture" in printed
    assert "because the model lacks a second network" in printed
    assert not continued(name).schedule.knows_classes
    shutil.rmtree(results / f"{name}__nnUNetPlans_cpu__2d")
    assert fork(name, source, source) == 1
    error = capsys.readouterr().err
    assert f"{source} is of another network: " in error and "second_network=" in error
    # What is left is nothing.
    assert not list(results.glob(f"{name}__*"))


def test_the_second_network_of_a_training_is_a_model(model, make_trainer, continued, results):
    """It lies beside the first one, as another fold, and says nothing but its weights."""
    trainer = make_trainer(f"nnUNetTrainerCPS_ramp_up=0.3{OWN}")
    trainer.on_train_start()
    trainer._second.write()
    trainer.save_checkpoint(f"{trainer.output_folder}/checkpoint_final.pth")
    second = Path(trainer.output_folder).with_name("fold_100")
    name = f"nnUNetTrainerCPS{OWN}"
    assert fork(name, trainer.output_folder, second) == 0
    state = checkpoints.read(results / f"{name}__nnUNetPlans_cpu__2d" / "fold_0" / "checkpoint_latest.pth")
    assert state["semiseg_state"]["trained_on"] == ["lab_00", "lab_01", "lab_02"]
    assert flat(continued(name).companions["second"]).equal(flat(trainer.companions["second"]))


def test_folds_of_second_networks_lead_back():
    for fold in (0, 4, 12, "all"):
        assert first_fold(f"fold_{second_fold(fold)}") == first_fold(f"fold_{fold}") == fold
    assert first_fold("somewhere") is first_fold("fold_x") is None


def test_untrained_heads_have_their_time_on_labels_alone(model, continued, capsys):
    name = f"nnUNetTrainerCoraNet{OWN}"
    assert fork(name, model()) == 0
    assert "The run starts with pretraining, because the model lacks heads\n" in capsys.readouterr().out
    trainer = continued(name)
    # min_recall is that of the main branch, which is trained.
    assert trainer.schedule.knows_classes and trainer.schedule.pretraining == 0.1 and not trainer.uses_unlabeled()
    name = f"nnUNetTrainerDTC{OWN}"
    assert fork(name, model()) == 0
    assert "The run starts with warm_up, because the model lacks distance" in capsys.readouterr().out
    assert continued(name).schedule.ramp() == 0


def test_a_model_that_does_not_find_a_class_is_not_trusted(model, continued, capsys):
    name = f"nnUNetTrainerCutMix{OWN}"
    assert fork(name, model(dice=(0.9, 0.1))) == 0
    assert "; phase 2 waits for min_recall 0.3, because the model's Dice is core 0.100" in capsys.readouterr().out
    assert not continued(name).schedule.knows_classes
    name = f"nnUNetTrainerCutMix{TWO_PHASES}{OWN}"
    assert fork(name, model(dice=(0.9, 0.1))) == 0
    assert continued(name).uses_unlabeled()


# Refusals


def refused(capsys, *arguments, **where):
    capsys.readouterr()
    assert fork(*arguments, **where) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_a_training_that_is_there_is_not_overwritten(model, results, capsys):
    source, name = model(), f"nnUNetTrainerCutMix{OWN}"
    assert fork(name, source) == 0
    file = results / f"{name}__nnUNetPlans_cpu__2d" / "fold_0" / "checkpoint_latest.pth"
    before = file.read_bytes()
    assert "has a training already (checkpoint_latest.pth). Continue it" in refused(capsys, name, source)
    assert file.read_bytes() == before


def test_a_model_that_has_seen_what_the_fold_hides_is_refused(model, splits, capsys):
    name = f"nnUNetTrainerCutMix{OWN}"
    folds = [
        {"train": ["lab_00", "lab_01", "lab_02"], "val": ["lab_05"], "unlabeled": ["lab_03", "lab_04"]},
        {"train": ["lab_00", "lab_03"], "val": ["lab_05"], "unlabeled": ["lab_01", "lab_02", "lab_04"]},
    ]
    splits(folds)
    stock = model(fold=1)
    assert f"{stock} was trained on lab_03, whose label fold 0" in refused(capsys, name, stock)
    ours = model(name=f"nnUNetTrainerCPS_ramp_up=0.3{OWN}")
    content = checkpoints.read(ours)
    content["semiseg_state"]["trained_on"] = ["lab_00", "lab_05"]
    checkpoints.write(content, ours)
    assert f"{ours} was trained on lab_05, on which fold 0" in refused(capsys, name, ours)


def test_a_model_of_another_task_is_refused(model, capsys, results):
    name = f"nnUNetTrainerCutMix{OWN}"
    source = model()

    def changed(change):
        content = checkpoints.read(source)
        change(content)
        checkpoints.write(content, source.with_name("changed.pth"))
        return refused(capsys, name, source.with_name("changed.pth"))

    def labels(content):
        content["init_args"]["dataset_json"]["labels"] = {"background": 0, "ball": 1, "shell": 2}

    def spacing(content):
        content["init_args"]["plans"]["configurations"]["2d"]["spacing"] = [2.0, 2.0]

    def features(content):
        content["network_weights"] = {k: v[:2] for k, v in content["network_weights"].items()}

    assert "was trained for the labels {'background': 0, 'ball': 1, 'shell': 2}, and Dataset801" in changed(labels)
    assert "was trained with other plans: a spacing of [2.0, 2.0], here [1.0, 1.0]" in changed(spacing)
    assert "changed.pth is of another network: encoder" in changed(features)
    assert "is not a checkpoint of an nnU-Net trainer" in changed(lambda content: content.pop("init_args"))
    assert not list(results.glob(f"{name}__*"))


def test_what_cannot_be_a_model_is_named(model, results, tmp_path, capsys):
    name, source = f"nnUNetTrainerCutMix{OWN}", model()
    model_folder = source.parent.parent
    assert f"{model_folder} has no checkpoint_final.pth. Give one of its checkpoints: fold_0/" in refused(
        capsys, name, model_folder
    )
    assert f"{tmp_path} has no checkpoint_final.pth. Train first" in refused(capsys, name, tmp_path)
    assert "There is no checkpoint" in refused(capsys, name, tmp_path / "x.pth")
    assert f"{name} trains one network, so --from takes one model, not 2" in refused(capsys, name, source, source)
    assert "there is no option 'weight'" in refused(capsys, "nnUNetTrainerCutMix_weight=1", source)
    # An exported model says what it is for, where it lies in its folder.
    plain = checkpoints.plain(checkpoints.read(source)["network_weights"], None, "2d")
    (tmp_path / "fold_0").mkdir()
    checkpoints.write(plain, tmp_path / "fold_0" / "checkpoint_final.pth")
    assert "plans.json" in refused(capsys, name, tmp_path / "fold_0")
    told = checkpoints.read(source)["init_args"]
    for key, file in (("plans", "plans.json"), ("dataset_json", "dataset.json")):
        (tmp_path / file).write_text(json.dumps(told[key]))
    assert fork(name, tmp_path / "fold_0") == 0
    assert "those of fold 0 of Dataset801_labels are assumed" in capsys.readouterr().out
