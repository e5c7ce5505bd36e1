"""Fine-tuning by nnU-Net: plans that fit a checkpoint, its weights in the network, the plug-in trainer.

``plugin/`` is the folder that nnU-Net searches (``nnUNet_extTrainer``). May import everything but the command line.
"""
