import pickle

import pytest

from nnunet_semiseg.trainers.methods.coranet import CoraNetOptions
from nnunet_semiseg.trainers.methods.mean_teacher import MeanTeacherOptions
from nnunet_semiseg.trainers.options import OptionError, build_options, parse_suffix
from nnunet_semiseg.trainers.registry import TRAINERS, find_trainer


def test_suffix_sets_method_options_and_schedule():
    assert parse_suffix("_20epochs_ema_decay=0.999_num_iterations_per_epoch=50", MeanTeacherOptions) == (
        {"ema_decay": 0.999},
        {"num_epochs": 20, "num_iterations_per_epoch": 50},
    )
    method, schedule = parse_suffix("_student_view=weak_allow_absent_classes=true_initial_lr=1e-3", MeanTeacherOptions)
    assert method == {"student_view": "weak", "allow_absent_classes": True}
    assert schedule == {"initial_lr": 1e-3}


@pytest.mark.parametrize(
    "suffix, complaint",
    [
        ("_alhpa=5", "no option 'alhpa'"),
        ("_alpha=five", "alpha=five is not of type float"),
        ("_alpha=0.5", "alpha=0.5 is outside 1.0.."),
        ("_alpha=nan", "outside"),
        ("_alpha=inf", "not finite"),
        ("_setting=both", "setting=both is not one of full, seg"),
        ("_all_heads=maybe", "all_heads=maybe is not of type bool"),
        ("_alpha=2_alpha=3", "alpha is given twice"),
        ("_0epochs", "num_epochs=0 is outside 1.."),
        ("_fast", "cannot read '_fast'"),
        ("_predicts=", "cannot read"),
        ("_num_epochs=2.5", "num_epochs=2.5 is not of type int"),
    ],
)
def test_bad_suffix_names_the_option_and_lists_the_valid_ones(suffix, complaint):
    with pytest.raises(OptionError) as error:
        parse_suffix(suffix, CoraNetOptions)
    message = str(error.value)
    assert complaint in message
    assert "alpha (float, default 5.0, 1.0..)" in message
    assert "initial_lr (float, default 0.01" in message
    assert "\n" not in message


def test_preset_changes_defaults_and_explicit_options_win():
    assert build_options(CoraNetOptions, {"preset": "code"}).all_heads
    chosen = build_options(CoraNetOptions, {"preset": "code", "certain_weight": 0.7})
    assert chosen.certain_weight == 0.7
    assert chosen.consistency_weight == CoraNetOptions.PRESETS["code"]["consistency_weight"]
    assert set(CoraNetOptions.PRESETS["paper"]) <= set(CoraNetOptions.__dataclass_fields__)


@pytest.mark.parametrize("name", TRAINERS)
def test_lookup_returns_the_same_class_each_time(name):
    variant = find_trainer(f"{name}_3epochs")
    assert variant is find_trainer(f"{name}_3epochs")
    assert variant is not find_trainer(f"{name}_4epochs")
    assert variant.__name__ == f"{name}_3epochs"
    assert issubclass(variant, find_trainer(name))


def test_a_name_that_makes_too_long_a_folder_is_refused_where_it_is_parsed(make_trainer):
    def named(length):
        name = "nnUNetTrainerCPS_ramp_up=0."
        return name + "1" * (length - len(name))

    with pytest.raises(OptionError, match="nnUNetTrainerCPS_ramp_up=0.1.* is 52 characters too long.*at most 255"):
        find_trainer(named(300))
    assert find_trainer(named(240)) is not None
    # With the plans' name and _second, which the search for trainers does not know.
    with pytest.raises(OptionError, match="is 13 characters too long"):
        make_trainer(named(240))


def test_names_of_others_are_none():
    assert find_trainer("nnUNetTrainer") is None
    assert find_trainer("nnUNetTrainerCoraNetwork") is None


def test_variant_classes_and_trainers_are_picklable(make_trainer):
    variant = find_trainer("nnUNetTrainerMeanTeacher_3epochs_ema_decay=0.9")
    assert pickle.loads(pickle.dumps(variant)) is variant
    trainer = make_trainer("nnUNetTrainerMeanTeacher_3epochs_ema_decay=0.9")
    copy = pickle.loads(pickle.dumps(trainer))
    assert (copy.num_epochs, copy.options.ema_decay) == (3, 0.9)


def test_defaults_of_the_schedule_are_nnunets(make_trainer):
    from dataclasses import fields

    from nnunet_semiseg.trainers.options import ScheduleOptions

    trainer = make_trainer("nnUNetTrainer")
    for field in fields(ScheduleOptions):
        assert getattr(trainer, field.name) == field.default, field.name


def test_schedule_reaches_the_trainer(make_trainer):
    trainer = make_trainer("nnUNetTrainerCoraNet_7epochs_initial_lr=0.005_save_every=3_alpha=2")
    assert (trainer.num_epochs, trainer.initial_lr, trainer.save_every) == (7, 0.005, 3)
    assert trainer.options.alpha == 2
