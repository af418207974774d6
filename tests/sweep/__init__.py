"""Every pipeline of diffusers that nobody has described: built tiny, and compared with a slow PAG.

Run by ``make sweep``. A pipeline is a :class:`sweep.spec.Spec` in one of the files of families; what
became of each is recorded in ``results.json``, of which ``docs/pipelines.md`` is made
(``sweep/page.py``).
"""
