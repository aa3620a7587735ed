"""What nnU-Net's trainer search looks at: asks the registry for any trainer name, variants with options included.

nnU-Net imports this file as a top-level module, looks the requested name up with ``hasattr`` and drops the module
again; the classes therefore live in ``nnunet_semiseg.trainers``, which stays imported.
"""

import sys


def __getattr__(name: str) -> type:
    # Also asked for __path__, __file__ and the like; only trainer names are worth the import.
    if not name.startswith("nnUNetTrainer"):
        raise AttributeError(name)
    try:
        from nnunet_semiseg.trainers.registry import find_trainer

        trainer = find_trainer(name)
    except Exception as error:
        # A wrong option, or an install that does not import: nnU-Net itself would only say "not found".
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        print(f"nnunet_semiseg: {reason}", file=sys.stderr, flush=True)
        trainer = None
    if trainer is None:
        raise AttributeError(name)
    return trainer
