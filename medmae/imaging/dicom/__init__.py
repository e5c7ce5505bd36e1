"""DICOM in: series found in folders and ZIPs, judged by their headers, read as volumes.

``finding`` turns a folder or ZIP into series: ``opening`` and ``zips`` open things; ``header``, with ``values``,
``facts``, ``enhanced`` and ``mosaic``, reads an allow-list of attributes; ``sorting`` makes volumes of the instances of
a series (``splitting`` takes slices apart, ``stacking`` orders them and finds what is missing); ``contrast`` recognises
modalities. ``series`` is what comes out, and ``reading`` reads it.

Text of a header is used for recognition only: it is in no message, no result and no ``repr``.
"""
