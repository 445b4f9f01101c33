"""Makes the stubs while the package is built, so that they suit the grpcio that is
there. All else is in pyproject.toml."""

import pathlib

import grpc_tools
from grpc_tools import protoc
from setuptools import setup
from setuptools.command.build_py import build_py

PROTO = "groupstate/v1/group_state.proto"


class BuildWithStubs(build_py):
    def run(self):
        super().run()
        # A link to the proto of the repository; a copy in a source distribution.
        ours = pathlib.Path(__file__).resolve().parent / "proto"
        googles = pathlib.Path(grpc_tools.__file__).parent / "_proto"
        failed = protoc.main(
            [
                "protoc",
                f"-I{ours}",
                f"-I{googles}",
                f"--python_out={self.build_lib}",
                f"--pyi_out={self.build_lib}",
                f"--grpc_python_out={self.build_lib}",
                PROTO,
            ]
        )
        if failed:
            raise SystemExit(f"protoc cannot compile {PROTO}")


setup(cmdclass={"build_py": BuildWithStubs})
