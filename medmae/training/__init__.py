"""The one training loop and what it needs: batches, augmentation, schedules, checkpoints, previews.

May import models, cohort, imaging and plan; nothing here knows a method by name.
"""
