"""How good are CoraNet's pseudo labels and masks? Scored with labels that the training did not see.

    python scripts/mask_quality.py MODEL_FOLDER/fold_0 IMAGES LABELS [--cases 20] [--checkpoint checkpoint_final.pth]

For a trained nnUNetTrainerCoraNet (uncertainty=cost): the share of voxels in the certain region, the error rate of
the main branch's labels inside and outside it, and Dice per class of the labels, of both heads, and inside the
certain region. An image is run whole, as one patch.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch.nn.functional import pad

from nnunet_semiseg import checkpoints
from nnunet_semiseg.files import read_json
from nnunet_semiseg.labels import LabelAdapter
from nnunet_semiseg.losses.uncertainty import agreement
from nnunet_semiseg.networks.features import forward_with_features
from nnunet_semiseg.networks.heads import FeatureHead


class TrainedCoraNet:
    """Main branch and both heads of a finished training.

    Args:
        fold: The folder ``fold_X`` of a model folder.
        checkpoint: File name in it.
    """

    def __init__(self, fold: Path, checkpoint: str = "checkpoint_final.pth"):
        self.plans = PlansManager(str(fold.parent / "plans.json"))
        self.dataset_json = read_json(fold.parent / "dataset.json")
        content = checkpoints.read(fold / checkpoint)
        self.configuration = self.plans.get_configuration(content["init_args"]["configuration"])
        self.labels = LabelAdapter(self.plans.get_label_manager(self.dataset_json))
        self.network = nnUNetTrainer.build_network_architecture(
            self.plans, self.configuration, len(self.dataset_json["channel_names"]), self.labels.num_outputs, False
        ).eval()
        # The heads are the student's; network_weights may be the teacher.
        state = content[checkpoints.STATE_KEY]
        self.network.load_state_dict(state.get("student", content["network_weights"]))
        self.heads = {}
        state = state["companions"]
        for name in ("conservative", "radical"):
            prefix = f"heads.{name}."
            self.heads[name] = FeatureHead(self.network, self.labels.num_foreground)
            self.heads[name].load_state_dict({k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)})

    def preprocess(self, image_files: list[str], label_file: str | None = None):
        """nnU-Net's (C, Z, Y, X) image, (1, Z, Y, X) labels and properties."""
        preprocessor = self.configuration.preprocessor_class(verbose=False)
        return preprocessor.run_case(image_files, label_file, self.plans, self.configuration, self.dataset_json)

    @torch.no_grad()
    def __call__(self, image: np.ndarray):
        """A (C, Z, Y, X) preprocessed image to hard labels, both heads' foreground (K) and the certain mask (1), each
        (., Z, Y, X)."""
        batch = torch.from_numpy(image)
        # The 2d network takes slices as samples.
        flat = len(self.configuration.patch_size) == 2
        batch = batch.transpose(0, 1) if flat else batch[None]
        size = batch.shape[2:]
        divisor = np.prod(self.configuration.pool_op_kernel_sizes, axis=0)
        padding = [int(-s % d) for s, d in zip(size, divisor)]
        padded = pad(batch, [p for after in reversed(padding) for p in (0, after)])
        logits, features = forward_with_features(self.network, padded)
        heads = {name: head(features) for name, head in self.heads.items()}
        results = [self.labels.hard(logits), *(h > 0 for h in heads.values()), agreement(*heads.values())]
        inside = (..., *(slice(s) for s in size))
        return [(r[inside].transpose(0, 1) if flat else r[inside][0]) for r in results]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fold", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("labels", type=Path)
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--checkpoint", default="checkpoint_final.pth")
    args = parser.parse_args()
    model = TrainedCoraNet(args.fold, args.checkpoint)
    ending = model.dataset_json["file_ending"]
    cases = sorted({p.name[: -len(ending) - 5] for p in args.images.glob("*" + ending)})[: args.cases]
    counts: dict[str, np.ndarray] = {}
    voxels = np.zeros(4)
    for case in cases:
        files = sorted(str(p) for p in args.images.glob(f"{case}_????{ending}"))
        image, truth, _ = model.preprocess(files, str(args.labels / f"{case}{ending}"))
        hard, conservative, radical, certain = model(image)
        truth = torch.from_numpy(np.maximum(truth, 0).astype(np.int64))
        true, valid = (t[0].bool() for t in model.labels.one_vs_rest(truth[None]))
        predicted = model.labels.one_vs_rest(hard[None])[0][0].bool()
        wrong = (predicted != true).any(0, keepdim=True)
        for part, mask in ((0, certain & valid), (2, ~certain & valid)):
            voxels[part : part + 2] += [int(mask.sum()), int((wrong & mask).sum())]
        for name, what, where in (
            ("main branch", predicted, valid),
            ("main branch, certain voxels", predicted, valid & certain),
            ("conservative head", conservative, valid),
            ("radical head", radical, valid),
        ):
            axes = tuple(range(1, what.ndim))
            sums = [(m & where).sum(axes).numpy() for m in (what & true, what, true)]
            counts[name] = counts.get(name, 0) + np.stack(sums)
    certain_voxels, certain_wrong, uncertain_voxels, uncertain_wrong = voxels
    print(f"{len(cases)} cases with withheld labels")
    print(f"certain region: {certain_voxels / (certain_voxels + uncertain_voxels):.4f} of all voxels")
    print(
        f"wrong labels inside: {certain_wrong / max(certain_voxels, 1):.4f}, outside: "
        f"{uncertain_wrong / max(uncertain_voxels, 1):.4f}"
    )
    names = [str(name) for name in model.labels.foreground_names]
    print("\n| Dice (precision / recall) | " + " | ".join(names) + " |\n|---" + "|---" * len(names) + "|")
    for name, (hit, what, true) in counts.items():
        cells = [
            f"{2 * h / max(w + t, 1):.3f} ({h / max(w, 1):.2f} / {h / max(t, 1):.2f})"
            for h, w, t in zip(hit, what, true)
        ]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
