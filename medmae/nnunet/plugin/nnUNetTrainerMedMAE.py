"""What nnU-Net finds: it imports every module of this folder until the class turns up."""

from medmae.nnunet.trainer import nnUNetTrainerMedMAE as nnUNetTrainerMedMAE
