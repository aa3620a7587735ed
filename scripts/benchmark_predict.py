"""Time, memory and voxels of ``nnunet_semiseg predict`` beside ``nnUNetv2_predict``, each on one core.

    python scripts/benchmark_predict.py                        # all of it: 4 minutes on an idle core
    python scripts/benchmark_predict.py --parts labels starts  # some; the table has what earlier calls have measured

The case is like a CT (100 x 512 x 512 voxels, 2.5 x 0.9 x 0.9 mm) with 13 organs, the model a U-Net of five stages for
patches of 64 x 96 x 96 voxels of 2.5 mm. Its last layer is fitted to the organs, so that its label maps have smooth
parts as those of a trained model; nothing else is trained. Times are seconds of the processor, of all processes
together.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

SHAPE, SPACING, TARGET, PATCH, CLASSES = (100, 512, 512), (2.5, 0.9, 0.9), (2.5, 2.5, 2.5), (64, 96, 96), 14
PARTS = ("starts", "labels", "image", "network", "stock", "f32", "bf16")


def measure(arguments: list[str]) -> dict:
    """Seconds of the processor and of the clock, and MB of the largest process, of a command and its children."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    start = time.perf_counter()
    process = subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout and process.stderr
    out, error = process.stdout.read().decode(), process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(arguments[:6])} ... failed:\n{out[-2000:]}\n{error[-2000:]}")
    found = {
        "seconds": usage.ru_utime + usage.ru_stime,
        "wall": time.perf_counter() - start,
        "mb": usage.ru_maxrss / 1024,
    }
    last = out.strip().splitlines()[-1:] or [""]
    return {**found, **json.loads(last[0])} if last[0].startswith("{") else found


def python(code: str, *arguments: object) -> dict:
    """``measure`` of a snippet, which sees this module's names; it may print more as JSON in its last line."""
    setup = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from benchmark_predict import *\n"
    return measure([sys.executable, "-c", setup + code, *map(str, arguments)])


class Stopwatch:
    """Of the processor's seconds, and the memory that is taken on top of what is there at the start, in MB."""

    def __enter__(self) -> Stopwatch:
        # From here on, the kernel counts the peak anew.
        Path("/proc/self/clear_refs").write_text("5")
        self._before = self._status("VmRSS")
        self._start = time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.process_time() - self._start
        self.mb = self._status("VmHWM") - self._before

    @staticmethod
    def _status(name: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(name))

    def show(self, **more: object) -> None:
        print(json.dumps({"part_seconds": self.seconds, "part_mb": self.mb, **more}))


def organs(shape: tuple[int, ...], spacing: tuple[float, ...]) -> np.ndarray:
    """A label map of 13 ellipsoids, the same in mm whatever the grid."""
    random = np.random.RandomState(0)
    labels = np.zeros(shape, dtype=np.uint8)
    size = np.array(SHAPE) * SPACING
    for label in range(1, CLASSES):
        center, radius = size * random.uniform(0.25, 0.75, 3), random.uniform(12, 45, 3)
        low = np.maximum(((center - radius) / spacing).astype(int), 0)
        high = np.minimum(((center + radius) / spacing).astype(int) + 2, shape)
        axes = [(np.arange(a, b) + 0.5) * s for a, b, s in zip(low, high, spacing)]
        distance = sum(
            (((axis - c) / r) ** 2).reshape([-1 if i == d else 1 for i in range(3)])
            for d, (axis, c, r) in enumerate(zip(axes, center, radius))
        )
        labels[tuple(slice(a, b) for a, b in zip(low, high))][distance < 1] = label
    return labels


def low_shape() -> tuple[int, ...]:
    return tuple(round(n * s / t) for n, s, t in zip(SHAPE, SPACING, TARGET))


def logits() -> np.ndarray:
    """(14, ...) float16 at the network's resolution: smooth, 12 inside an organ, with noise."""
    from scipy.ndimage import gaussian_filter, zoom

    shape = low_shape()
    labels, random = organs(shape, TARGET), np.random.RandomState(1)
    values = np.empty((CLASSES, *shape), dtype=np.float16)
    for label in range(CLASSES):
        noise = zoom(random.normal(size=[n // 4 + 2 for n in shape]), 4, order=1)[tuple(slice(0, n) for n in shape)]
        values[label] = 12 * gaussian_filter((labels == label).astype(np.float32), 1.0) + noise
    return values


def write_model_and_image(folder: Path) -> None:
    import nibabel
    import torch
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    from nnunet_semiseg.inference.model import Model
    from nnunet_semiseg.inference.preprocessing import preprocess

    model_folder = folder / "model"
    (model_folder / "fold_0").mkdir(parents=True)
    (folder / "images").mkdir()
    stages = 5
    architecture = dict(
        n_stages=stages,
        features_per_stage=[min(24 * 2**i, 320) for i in range(stages)],
        conv_op="torch.nn.modules.conv.Conv3d",
        kernel_sizes=[[3] * 3] * stages,
        strides=[[1] * 3, *[[2] * 3] * (stages - 1)],
        n_conv_per_stage=[2] * stages,
        n_conv_per_stage_decoder=[2] * (stages - 1),
        conv_bias=True,
        norm_op="torch.nn.modules.instancenorm.InstanceNorm3d",
        norm_op_kwargs=dict(eps=1e-5, affine=True),
        dropout_op=None,
        dropout_op_kwargs=None,
        nonlin="torch.nn.LeakyReLU",
        nonlin_kwargs=dict(inplace=True),
    )
    name, imported = "dynamic_network_architectures.architectures.unet.PlainConvUNet", ["conv_op", "norm_op", "nonlin"]
    resampling = {f"resampling_fn_{what}": "resample_data_or_seg_to_shape" for what in ("data", "seg", "probabilities")}
    for what, order in (("data", 3), ("seg", 1), ("probabilities", 1)):
        kwargs = dict(is_seg=what == "seg", order=order, order_z=0, force_separate_z=None)
        resampling[f"resampling_fn_{what}_kwargs"] = kwargs
    configuration = dict(
        data_identifier="3d_fullres",
        preprocessor_name="DefaultPreprocessor",
        batch_size=2,
        patch_size=PATCH,
        spacing=TARGET,
        normalization_schemes=["CTNormalization"],
        use_mask_for_norm=[False],
        architecture=dict(network_class_name=name, arch_kwargs=architecture, _kw_requires_import=imported),
        **resampling,
    )
    plans = dict(
        dataset_name="Dataset900_Benchmark",
        plans_name="nnUNetPlans",
        image_reader_writer="SimpleITKIO",
        transpose_forward=[0, 1, 2],
        transpose_backward=[0, 1, 2],
        label_manager="LabelManager",
        foreground_intensity_properties_per_channel={
            "0": dict(mean=100.0, std=80.0, percentile_00_5=-100.0, percentile_99_5=320.0)
        },
        configurations={"3d_fullres": configuration},
    )
    names = {"background": 0, **{f"organ {i}": i for i in range(1, CLASSES)}}
    dataset_json = dict(channel_names={"0": "CT"}, labels=names, numTraining=1, file_ending=".nii.gz")
    (model_folder / "plans.json").write_text(json.dumps(plans))
    (model_folder / "dataset.json").write_text(json.dumps(dataset_json))

    labels = organs(SHAPE, SPACING)
    intensities = np.array([-50, *np.linspace(40, 300, CLASSES - 1)])
    image = intensities[labels] + np.random.RandomState(2).normal(0, 5, SHAPE)
    image = np.round(image).astype(np.int16)
    nifti = nibabel.Nifti1Image(image.T, np.diag([*SPACING[::-1], 1]))
    nibabel.save(nifti, folder / "images" / "case_0000.nii.gz")

    torch.manual_seed(0)
    network = get_network_from_plans(name, architecture, imported, 1, CLASSES, deep_supervision=False).eval()
    model = Model(model_folder, "3d_fullres", plans, dataset_json, (), None)
    data = preprocess(image.astype(np.float32)[None], SPACING, model).data
    window = tuple(slice((n - p) // 2, (n - p) // 2 + p) for n, p in zip(data.shape[1:], PATCH))
    seen = []
    last = network.decoder.seg_layers[-1]
    hook = last.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        network(torch.from_numpy(data[(slice(None), *window)][None]))
        hook.remove()
        features = seen[0][0].flatten(1).T.double()
        features = torch.cat([features, torch.ones(len(features), 1)], 1)
        target = torch.from_numpy(organs(low_shape(), TARGET)[window].ravel()).long()
        weights = 1 / torch.bincount(target, minlength=CLASSES).clamp(min=100)[target].sqrt()[:, None]
        one_hot = torch.nn.functional.one_hot(target, CLASSES).double()
        fitted = torch.linalg.lstsq(features * weights, 20 * one_hot * weights).solution.float()
        last.weight.copy_(fitted[:-1].T.reshape(last.weight.shape))
        last.bias.copy_(fitted[-1])
    checkpoint = dict(
        network_weights=network.state_dict(),
        inference_allowed_mirroring_axes=(0, 1, 2),
        trainer_name="nnUNetTrainer",
        init_args=dict(configuration="3d_fullres"),
    )
    torch.save(checkpoint, model_folder / "fold_0" / "checkpoint_final.pth")


_STOCK_LABELS = """
from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape
values = np.load(sys.argv[1])
with Stopwatch() as watch:
    # And LabelManager's argmax.
    full = resample_data_or_seg_to_shape(values, SHAPE, TARGET, SPACING, order=1, order_z=0, force_separate_z=None)
    labels = full.argmax(0)
np.save(sys.argv[2], labels.astype(np.uint8))
watch.show()
"""
_OWN_LABELS = """
from nnunet_semiseg.inference import resampling
values = np.load(sys.argv[1])
with Stopwatch() as watch:
    labels = resampling.labels(values, SHAPE, resampling.Resampling(1, 0, None), TARGET, SPACING)
stock = np.load(sys.argv[2])
watch.show(different=int((labels != stock).sum()), voxels=labels.size)
"""
_IMAGE = """
import importlib
image = np.random.RandomState(0).normal(0, 100, (1, *SHAPE)).astype(np.float32)
from nnunet_semiseg.inference import resampling
with Stopwatch() as own:
    ours = resampling.resample(image, low_shape(), resampling.Resampling(3, 0, None), SPACING, TARGET)
from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape
with Stopwatch() as watch:
    theirs = resample_data_or_seg_to_shape(
        image, low_shape(), SPACING, TARGET, order=3, order_z=0, force_separate_z=None
    )
watch.show(own_seconds=own.seconds, own_mb=own.mb, difference=float(np.abs(ours - theirs).max()))
"""
_NETWORK = """
from nnunet_semiseg.inference import openvino_runtime, predictor, torch_runtime
import torch
torch.set_num_threads(1)
model = predictor.open_model(Path(sys.argv[1]))
window = np.random.RandomState(0).normal(size=(1, 1, *PATCH)).astype(np.float32)
def per_window(run, times=2):
    run()
    start = time.process_time()
    for _ in range(times):
        run()
    return (time.process_time() - start) / times
network, _, _ = torch_runtime.build(model)
found = {}
with torch.inference_mode():
    found["torch"] = per_window(lambda: network(torch.from_numpy(window)), 1)
for precision in ("f32", "bf16"):
    own = openvino_runtime.OpenVINO(precision, 1).network(model.checkpoints[0])
    found[precision] = per_window(lambda: list(own([window])))
print(json.dumps(found))
"""
_IMPORTS = {
    "stock": "import nnunetv2.inference.predict_from_raw_data",
    "own": "import nnunet_semiseg.inference.predictor as p; p.openvino_runtime.import_openvino()",
}
_READY = """
from nnunet_semiseg.inference.predictor import Path, Predictor, Settings, open_model
import sys
Predictor([open_model(Path(sys.argv[1]))], Settings(threads=1))
"""


def run(part: str, folder: Path, results: dict) -> None:
    model, images = folder / "model", folder / "images"
    if part in ("starts", "network", "f32", "bf16"):
        python("from nnunet_semiseg.inference import predictor as p; p.convert(p.open_model(Path(sys.argv[1])))", model)
    if part == "starts":
        results["imports"] = {who: measure([sys.executable, "-c", code]) for who, code in _IMPORTS.items()}
        results["ready"] = measure([sys.executable, "-c", _READY, str(model)])
    elif part == "labels":
        python("np.save(sys.argv[1], logits())", folder / "logits.npy")
        files = folder / "logits.npy", folder / "labels.npy"
        results["labels"] = {"stock": python(_STOCK_LABELS, *files), "own": python(_OWN_LABELS, *files)}
    elif part == "image":
        results["image"] = python(_IMAGE)
    elif part == "network":
        results["network"] = python(_NETWORK, model)
    elif part == "stock":
        bin_folder = Path(sys.executable).parent
        command = [bin_folder / "nnUNetv2_predict_from_modelfolder", "-i", images, "-o", folder / "stock", "-m", model]
        more = ["-f", "0", "-device", "cpu", "-npp", "1", "-nps", "1", "--disable_tta"]
        results["stock"] = measure([str(word) for word in [*command, *more]])
    else:
        command = [sys.executable, "-m", "nnunet_semiseg.cli", "predict", "-i", images, "-o", folder / part]
        more = ["-m", model, "--threads", 1, "--precision", part, "--overwrite"]
        results[part] = measure([str(word) for word in [*command, *more]])


def agreement(folder: Path, part: str) -> float:
    """Share of the voxels that are as stock nnU-Net has them."""
    import nibabel

    first, second = (np.asarray(nibabel.load(folder / name / "case.nii.gz").dataobj) for name in ("stock", part))
    return float((first == second).mean())


def report(folder: Path, results: dict) -> None:
    rows = []

    def row(stage: str, stock: dict, own: dict, more: str = "", key: str = "seconds", mb: str = "mb") -> None:
        rows.append((stage, f"{stock[key]:.2f} s, {stock[mb]:.0f} MB", f"{own[key]:.2f} s, {own[mb]:.0f} MB"))
        rows[-1] += (f"{stock[key] / own[key]:.1f}", f"{stock[mb] / own[mb]:.1f}", more)

    if "imports" in results:
        row("imports", results["imports"]["stock"], results["imports"]["own"])
        ready = results["ready"]
        rows.append(("start to network", "", f"{ready['seconds']:.2f} s, {ready['mb']:.0f} MB", "", "", ""))
    if "image" in results:
        found = results["image"]
        own = {"seconds": found["own_seconds"], "mb": found["own_mb"]}
        stock = {"seconds": found["part_seconds"], "mb": found["part_mb"]}
        row("image resampling", stock, own, f"largest difference {found['difference']:g}")
    for precision in ("f32", "bf16") if "network" in results else ():
        found = results["network"]
        seconds = f"{found['torch']:.2f} s", f"{found[precision]:.2f} s", f"{found['torch'] / found[precision]:.2f}"
        rows.append((f"a window, {precision}", *seconds, "", ""))
    if "labels" in results:
        found = results["labels"]
        more = f"{found['own']['different']} of {found['own']['voxels']} voxels differ"
        row("logits to labels", found["stock"], found["own"], more, "part_seconds", "part_mb")
    for precision in ("f32", "bf16"):
        if precision in results and "stock" in results:
            more = f"{100 * agreement(folder, precision):.4f} % of voxels equal"
            row(f"start to end, {precision}", results["stock"], results[precision], more)
    print("| stage | stock nnU-Net | nnunet_semiseg predict | faster | less memory | |\n|---|---|---|---|---|---|")
    for cells in rows:
        print("| " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("-o", type=Path, default=Path(tempfile.gettempdir()) / "benchmark_predict", help="work folder")
    args = parser.parse_args()
    file = args.o / "results.json"
    if not (args.o / "model" / "fold_0" / "checkpoint_final.pth").is_file():
        # Not here: the memory of a process counts as that of those that it starts.
        python("write_model_and_image(Path(sys.argv[1]))", args.o)
    results = json.loads(file.read_text()) if file.is_file() else {}
    for part in args.parts:
        run(part, args.o, results)
        file.write_text(json.dumps(results, indent=2))
    report(args.o, results)


if __name__ == "__main__":
    main()
