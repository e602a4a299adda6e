"""What a fork server of runs does before its first fork: the imports of a run, and two slow first uses.

    forking.preload(["forked_runs"])

Every forked process starts with the modules and with the results that DeepSpeed and transformers keep.
"""

import gc
import importlib

gc.disable()  # The objects of modules stay. `forking` enables collections again in the forked processes.

IMPORTED = (
    "PIL.BmpImagePlugin",
    "PIL.GifImagePlugin",
    "PIL.JpegImagePlugin",
    "PIL.PpmImagePlugin",
    "deepspeed.module_inject.auto_ep_layer",
    "distutils.core",
    "dmdr_models.generate",
    "dmdr_models.sd3.family",
    "dmdr_models.sdxl.family",
    "dmdr_models.sit.family",
    "dmdr_rewards.models.class_label",
    "dmdr_rewards.models.clip",
    "dmdr_rewards.score.command",
    "dmdr_train.cli",
    "dmdr_train.objectives.distribution_matching",
    "dmdr_train.objectives.refl",
    "dmdr_train.run.preflight",
    "dmdr_train.run.python_api",
    "dmdr_train.run.runner",
    "dmdr_train.tracking.tensorboard",
    "matplotlib.backends.backend_agg",
    "matplotlib.pyplot",
    "open_clip",
    "torch.utils.tensorboard",
    "torchmetrics.image",
    "transformers.models.vit.modeling_vit",
)

importlib.import_module("setuptools")  # before distutils, which it provides
for name in IMPORTED:
    importlib.import_module(name)

importlib.import_module("deepspeed.ops").__compatible_ops__  # noqa: B018
importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("vit")
