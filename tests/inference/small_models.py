"""Small plain nnU-Net models with random weights, and images for them."""

import json

import nibabel
import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from scipy.ndimage import gaussian_filter

from nnunet_semiseg.inference import predictor

RESAMPLING = {
    "resampling_fn_data": "resample_data_or_seg_to_shape",
    "resampling_fn_seg": "resample_data_or_seg_to_shape",
    "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
    "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None},
    "resampling_fn_seg_kwargs": {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None},
    "resampling_fn_probabilities_kwargs": {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None},
}
CLASSES = {"background": 0, "one": 1, "two": 2, "three": 3}
REGIONS = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "center": 3}


def plans_of(dim=3, spacing=(2.0, 1.5, 1.5), patch=(8, 16, 16), schemes=("ZScoreNormalization",), masked=False, **more):
    name = "2d" if dim == 2 else "3d_fullres"
    intensities = {"mean": 30.0, "std": 60.0, "percentile_00_5": -40.0, "percentile_99_5": 90.0}
    configuration = {
        "data_identifier": name,
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": list(patch[-dim:]),
        "spacing": list(spacing[-dim:]),
        "normalization_schemes": list(schemes),
        "use_mask_for_norm": [masked] * len(schemes),
        **RESAMPLING,
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": {
                "n_stages": 2,
                "features_per_stage": [4, 8],
                "conv_op": f"torch.nn.modules.conv.Conv{dim}d",
                "kernel_sizes": [[3] * dim] * 2,
                "strides": [[1] * dim, [2] * dim],
                "n_conv_per_stage": [1, 1],
                "n_conv_per_stage_decoder": [1],
                "conv_bias": True,
                "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dim}d",
                "norm_op_kwargs": {"eps": 1e-05, "affine": True},
                "dropout_op": None,
                "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
        "batch_dice": True,
        **more.pop("configuration", {}),
    }
    return {
        "dataset_name": "Dataset900_Small",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": more.pop("reader", "SimpleITKIO"),
        "transpose_forward": more.pop("transpose", [0, 1, 2]),
        "transpose_backward": more.pop("back", [0, 1, 2]),
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {str(i): intensities for i in range(len(schemes))},
        # As nnU-Net's plans have it.
        "configurations": {"base": configuration, name: {"inherits_from": "base", "spacing": configuration["spacing"]}},
    }


def write_model(folder, labels=CLASSES, folds=("0",), dim=3, seed=0, **more):
    """A model folder; ``more`` is for ``plans_of``."""
    plans = plans_of(dim, **more)
    folder.mkdir(parents=True)
    channels = len(plans["configurations"]["base"]["normalization_schemes"])
    dataset_json = {
        "channel_names": {str(i): f"MRI{i}" for i in range(channels)},
        "labels": labels,
        "numTraining": 1,
        "file_ending": ".nii.gz",
    }
    if labels is REGIONS:
        dataset_json["regions_class_order"] = [1, 2, 3]
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(dataset_json))
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    architecture = plans["configurations"]["base"]["architecture"]
    for i, fold in enumerate(folds):
        torch.manual_seed(100 * seed + i)
        network = get_network_from_plans(
            architecture["network_class_name"],
            architecture["arch_kwargs"],
            architecture["_kw_requires_import"],
            channels,
            len(labels) - (labels is REGIONS),
            deep_supervision=False,
        )
        # Logits as far from each other as those of trained networks.
        with torch.no_grad():
            for layer in network.decoder.seg_layers:
                layer.weight *= 10
        (folder / f"fold_{fold}").mkdir()
        checkpoint = {
            "network_weights": network.state_dict(),
            "inference_allowed_mirroring_axes": tuple(range(dim)),
            "trainer_name": "nnUNetTrainer",
            "init_args": {"configuration": "2d" if dim == 2 else "3d_fullres"},
        }
        torch.save(checkpoint, folder / f"fold_{fold}" / "checkpoint_final.pth")
    return folder


def volume(shape, seed=0, border=2):
    """A smooth (Z, Y, X) int16 image with a border of 0 and a hole."""
    random = np.random.RandomState(seed)
    image = 100 * gaussian_filter(random.normal(size=shape), 1.5)
    image = np.round(image * 10 + 30).astype(np.int16)
    inside = np.zeros(shape, dtype=bool)
    inside[(slice(1, None), *(slice(border, -border or None) for _ in shape[1:]))] = True
    inside[shape[0] // 2, shape[1] // 2, shape[2] // 2] = False
    image[~inside] = 0
    return image


def write_nifti(file, image, spacing=(2.0, 1.5, 1.5)):
    """(Z, Y, X) with a rotated, mirrored geometry; spacing in mm, Z first."""
    file.parent.mkdir(parents=True, exist_ok=True)
    turn = np.deg2rad(10)
    rotation = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = rotation @ np.diag([-spacing[2], -spacing[1], spacing[0]])
    affine[:3, 3] = (10, -20, 30)
    nifti = nibabel.Nifti1Image(image.T, affine)
    nifti.set_qform(affine, 1)
    nifti.set_sform(affine, 1)
    nibabel.save(nifti, file)
    return file


def stock(folder, step=0.5, mirroring=False, folds=None):
    """nnU-Net's own predictor of a model folder."""
    own = nnUNetPredictor(
        tile_step_size=step, use_mirroring=mirroring, device=torch.device("cpu"), allow_tqdm=False, verbose=False
    )
    own.initialize_from_trained_model_folder(str(folder), folds)
    return own


def stock_labels(folder, files, output, **how):
    """nnU-Net's label map of a case, written to ``output`` without its ending; its voxels (Z, Y, X)."""
    stock(folder, **how).predict_from_files_sequential(
        [[str(file) for file in files]], [str(output)], save_probabilities=False
    )
    return np.asarray(nibabel.load(f"{output}.nii.gz").dataobj).T


def open_with(folder, runtime="openvino", folds=None, **settings):
    models = [predictor.open_model(one, folds) for one in (folder if isinstance(folder, list) else [folder])]
    return predictor.Predictor(models, predictor.Settings(runtime=runtime, threads=1, **settings))
