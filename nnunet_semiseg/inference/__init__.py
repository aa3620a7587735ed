"""Prediction with plain nnU-Net models, with the voxels of ``nnUNetv2_predict --disable_tta``.

With a network in OpenVINO nothing here imports torch or nnunetv2: numpy, scipy and nibabel suffice. What nnU-Net does
on the way is written again without torch, and the tests hold each part to nnU-Net's own function.
"""
