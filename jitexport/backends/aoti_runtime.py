"""The part of every AOTInductor library that is the same in all of them, compiled once on a machine.

Torch puts the functions by which a library is opened and run into the code of each library. For a small graph they are
most of what the C++ compiler does. Here they are compiled by themselves, kept in torch's cache, and linked.

So are the members of the class that each library's model derives from: by one of them, which reads a device's name,
every library would compile all that <regex> is made of, half of its source's time.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch

#: How the linker knows it: a name without a folder, since command lines are what torch finds its own cache by.
NAME = "jitexport-runtime.o"
#: The class that libraries take from the common part, and how they say so.
BASE = "template class AOTInductorModelBase<AOTInductorModel>;"
FROM_ELSEWHERE = f"namespace torch::aot_inductor {{ extern {BASE} }}\n"


@contextmanager
def shared_runtime(device: torch.device) -> Iterator[Mapping[str, object]]:
    """Libraries that are compiled inside, with the settings that this gives, are linked to the common part.

    For CPUs on Linux. With a torch that generates its code in another way, nothing changes.
    """
    folder = runtime_folder() if device.type == "cpu" and os.uname().sysname == "Linux" else None
    if folder is None:
        yield {}
        return
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu

    def write_interface_header(wrapper: CppWrapperCpu) -> None:
        getattr(wrapper.header, "splice_aot", wrapper.header.splice)(FROM_ELSEWHERE)

    places = os.pathsep.join(filter(None, (str(folder), os.environ.get("LIBRARY_PATH"))))
    with (
        mock.patch.object(CppWrapperCpu, "_write_aoti_interface_header", write_interface_header),
        mock.patch.dict(os.environ, LIBRARY_PATH=places),
    ):
        yield {"aot_inductor.custom_op_libs": [f":{NAME}"]}


def runtime_folder() -> Path | None:
    """The folder of the compiled common part, which is made if it is not there; None with a torch that has no such."""
    from torch._inductor import codecache, config, cpp_builder, cpu_vec_isa
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    source = Path(codecache.__file__).parent / "codegen" / "aoti_runtime" / "interface.cpp"
    known = hasattr(CppWrapperCpu, "_write_aoti_interface_header") and hasattr(config.aot_inductor, "custom_op_libs")
    if not known or not source.is_file() or config.aot_inductor.custom_op_libs:
        return None
    text = "\n".join((
        "#include <torch/csrc/inductor/aoti_include/cpu.h>", source.read_text(encoding="utf-8"),
        f"namespace torch::aot_inductor {{ {BASE} }}", "",
    ))  # fmt: skip
    options = cpp_builder.CppTorchDeviceOptions(
        vec_isa=cpu_vec_isa.pick_vec_isa(), device_type="cpu", aot_mode=True, compile_only=True, min_optimize=True
    )

    def builder(folder: Path) -> cpp_builder.CppBuilder:
        path = folder / Path(NAME).with_suffix(".cpp")
        return cpp_builder.CppBuilder(path.stem, str(path), output_dir=str(folder), BuildOption=options)

    compiler = cpp_builder.get_compiler_version_info(options.get_compiler())
    what = "\n".join((text, torch.__version__, compiler, builder(Path()).get_command_line()))
    folder = Path(cache_dir()) / "jitexport" / hashlib.sha256(what.encode()).hexdigest()[:32]
    if not (folder / NAME).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        # Two processes may do so at once: each moves what is complete into the other's place.
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            (Path(scratch) / NAME).with_suffix(".cpp").write_text(text, encoding="utf-8")
            builder(Path(scratch)).build()
            (Path(scratch) / NAME).replace(folder / NAME)
    return folder
