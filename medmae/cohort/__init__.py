"""What a study is, where studies are found, what is wrong with them, and the prepared store that training reads.

``study`` and ``modalities`` name things; ``naming`` reads file names; ``layouts`` (with ``folders``, ``bids``,
``nnunet_raw`` and ``table``) turns a folder or table into studies; ``integrity`` finds every problem in one pass;
``store`` prepares studies (``building`` does one; ``sources``, ``claiming``, ``workers`` and ``index`` serve it) and
``prepared`` reads them back; ``demo`` makes a cohort with real anatomy. May import ``medmae.imaging``,
``medmae.plan``, ``medmae.files`` and ``medmae.errors``; never a model, never torch.
"""
