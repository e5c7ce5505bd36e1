"""DICOM out: synthesised modalities as MR images, label maps as segmentations, and the way to and from an archive.

``writing`` and ``segmentation`` (with ``segment_codes``) make objects from a volume and the files of the series that it
belongs to: ``source`` and ``stack`` read those, ``identity`` says what is copied of them, ``references`` what is
referred to, ``pixels`` and ``uids`` make the new parts, ``files`` writes. ``archive`` speaks to a PACS
(``association``, ``quiet``). Nothing here knows how DICOM is read for training: see ``medmae.imaging.dicom``.
"""
