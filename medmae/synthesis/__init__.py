"""From a trained model to whole volumes: sliding windows over shifted patch grids (``windows``), studies in and files
out (``reconstruct``), scores beside two floors (``evaluate``, ``floors``, ``metrics``) and the page to look at
(``report``). May import imaging, cohort and models; nothing here trains. Import the modules, or the functions
themselves from ``medmae``.
"""
