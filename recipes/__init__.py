"""How the models are made: corpus, hearing, units, tokenizers, vocoder, LM, evaluation.

Every recipe is a sub-command of ``python -m recipes``; none is imported by ``stages`` or ``agent``.
"""
