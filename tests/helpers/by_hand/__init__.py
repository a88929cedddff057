"""Right answers to the exercises in another form than the package's, one module per notebook, as a student might write them."""

import importlib
import pkgutil

ANSWERS = {}
for module in pkgutil.iter_modules(__path__):
    ANSWERS |= importlib.import_module(f"{__name__}.{module.name}").ANSWERS
