"""What an import costs: seconds of start-up, for a shell completion as for a server."""

import json
import os
import subprocess
import sys

import pytest

HEAVY = ("torch", "diffusers", "transformers", "scipy", "numpy", "PIL", "huggingface_hub", "jitexport.build")
MODEL_CODE_AND_COMPILERS = ("diffusers", "transformers", "torch.export", "torch._inductor", "torch._dynamo", "scipy")


def modules_after(code: str) -> set[str]:
    """Names of all modules in a fresh interpreter after `code`."""
    code = f"import sys\n{code}\nimport json; print('\\n' + json.dumps(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    return set(json.loads(run.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "code",
    [
        "import jitexport",
        "import jitexport; dir(jitexport); jitexport.__version__; jitexport.JitExportError",
        "import jitexport.cli",
        "import jitexport.registry",
        "import jitexport.cli as c\ntry: c.main(['--help'])\nexcept SystemExit: pass",
        "import jitexport.cli as c\ntry: c.main(['build', '--help'])\nexcept SystemExit: pass",
        "import jitexport.cli as c\ntry: c.main(['--version'])\nexcept SystemExit: pass",
    ],
)
def test_these_import_nothing_heavy(code):
    assert modules_after(code).isdisjoint(HEAVY)


@pytest.fixture(scope="module")
def of_torch() -> set[str]:
    """What `import torch` alone brings, which in some versions includes torch.export."""
    return modules_after("import torch")


def test_the_runtime_imports_no_model_code_and_no_compiler(of_torch):
    loaded = modules_after("import jitexport.runtime, jitexport.methods.jit, jitexport.bundle")
    assert "torch" in loaded
    assert not [name for name in loaded - of_torch if name.startswith(MODEL_CODE_AND_COMPILERS)]


@pytest.mark.parametrize("package", ["models", "methods", "backends"])
def test_models_methods_and_backends_do_not_import_each_other(package):
    """Of each kind, all modules may be loaded without one of the other kinds, their contracts aside."""
    others = {"models", "methods", "backends"} - {package}
    code = (
        "import importlib, pkgutil\n"
        f"package = importlib.import_module('jitexport.{package}')\n"
        "for m in pkgutil.iter_modules(package.__path__):\n"
        "    try: importlib.import_module(f'{package.__name__}.{m.name}')\n"
        "    except ImportError: pass  # a library of an extra that is not installed\n"
    )
    loaded = modules_after(code)
    strays = {
        name
        for name in loaded
        for other in others
        if name.startswith(f"jitexport.{other}.") and name != f"jitexport.{other}.base"
    }
    assert not strays
