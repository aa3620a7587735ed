import copy

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import nn

from nnunet_semiseg.networks.ema import EMATeacher, unwrap


def unet():
    return PlainConvUNet(1, 2, (4, 8), nn.Conv2d, 3, (1, 2), 1, 2, 1, norm_op=nn.InstanceNorm2d, deep_supervision=True)


def perturb(network):
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter))


def test_first_update_copies_the_student_and_the_next_ones_average():
    student = nn.Linear(2, 2)
    teacher = EMATeacher(student, 0.99, warm_up=True)
    seen = []
    for _ in range(5):
        perturb(student)
        seen.append(student.weight.detach().clone())
        teacher.update(student)
        # 1 - 1 / (t + 1) is the plain mean of all students so far.
        torch.testing.assert_close(teacher.module.weight, torch.stack(seen).mean(0))


def test_closed_form_with_a_constant_student():
    student = unet()
    teacher = EMATeacher(student, 0.9, warm_up=False)
    start = copy.deepcopy(teacher.module)
    perturb(student)
    for _ in range(7):
        teacher.update(student)
    for t, t0, s in zip(teacher.module.parameters(), start.parameters(), student.parameters()):
        torch.testing.assert_close(t, s + 0.9**7 * (t0 - s))


def test_shared_tensors_move_once_per_update():
    """The decoder's reference to the encoder names most tensors of the state dict several times."""
    student = unet()
    assert len(student.state_dict()) > len(list(student.parameters()))
    teacher = EMATeacher(student, 0.75, warm_up=False)
    before = [p.clone() for p in teacher.module.parameters()]
    perturb(student)
    teacher.update(student)
    for b, t, s in zip(before, teacher.module.parameters(), student.parameters()):
        torch.testing.assert_close(t - b, 0.25 * (s - b))


def test_buffers_are_copied():
    student = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    teacher = EMATeacher(student, 0.99, warm_up=True)
    student(torch.randn(4, 1, 3, 3))
    teacher.update(student)
    assert torch.equal(teacher.module[1].running_mean, student[1].running_mean)
    assert int(teacher.module[1].num_batches_tracked) == 1


def test_teacher_needs_no_gradient_and_its_count_is_saved():
    student = unet()
    teacher = EMATeacher(student, 0.99, warm_up=True)
    assert not any(p.requires_grad for p in teacher.parameters())
    for _ in range(3):
        teacher.update(student)
    restored = EMATeacher(unet(), 0.99, warm_up=True)
    restored.load_state_dict(teacher.state_dict())
    assert restored.current_decay() == teacher.current_decay() == 1 - 1 / 4


def test_copy_from_starts_anew():
    student = unet()
    teacher = EMATeacher(student, 0.99, warm_up=True)
    perturb(student)
    teacher.update(student)
    perturb(student)
    teacher.copy_from(student)
    assert all(torch.equal(t, s) for t, s in zip(teacher.module.parameters(), student.parameters()))
    assert teacher.current_decay() == 0


def test_compiled_networks_are_unwrapped():
    student = unet()
    assert unwrap(torch.compile(student)) is student
