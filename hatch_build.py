"""Compiles the CPU kernels into the wheel. Without a C++ compiler the package is as complete, but multiplies packed weights by way of torch."""

import runpy
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CustomBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """What hatchling calls before it packs a wheel or installs in place."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        kernels = Path(self.root, "compress", "kernels")
        build = runpy.run_path(str(kernels / "build.py"))
        compiler, library = build["compiler"](), kernels / "cpu" / "libt16.so"
        if compiler is None:
            self.app.display_warning("no C++ compiler found: packed weights will be multiplied by way of torch, which is slower")
            return
        try:
            build["compile_library"](compiler, library)
        except (OSError, subprocess.CalledProcessError) as error:
            self.app.display_warning(f"the CPU kernels do not compile, so torch will do their work: {getattr(error, 'stderr', '') or error}")
            return
        build_data["artifacts"].append(str(library.relative_to(self.root)))
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
