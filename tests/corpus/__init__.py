"""Models to test the runtime on: those of transformers and diffusers, vision nets and torch.nn's own modules.

None is listed: they are found in the packages that are installed, and made small by rules on the names of their sizes.
`python -m pytest -m corpus` runs all of them, and prints what was served and what was not, with the reason.
"""
