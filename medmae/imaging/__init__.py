"""What an image is: a volume with its place in the world, NIfTI files, geometry, intensities and the model's space.

Imports numpy, scipy, nibabel, SimpleITK and :mod:`medmae.errors`; never torch, a model or a cohort. Axes of every
array are the voxel axes (i, j, k) of the affine that goes with it; every affine maps voxel indices to RAS+ mm.
"""
