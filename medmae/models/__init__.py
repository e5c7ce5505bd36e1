"""The methods: tokens, encoders, decoders and losses. One file a method, read top to bottom.

Nothing here reads a file or knows what a study is; the only imports from the project are ``medmae.plan``,
``medmae.masking`` and ``medmae.errors``. A method is a module named after it that defines ``Config`` (the plan's
``model`` section) and ``build(plan)``; ``zoo`` finds it by name.
"""
