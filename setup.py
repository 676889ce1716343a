"""Packaging. ``pip install .[cpu,test]`` on a laptop, ``.[gpu]`` on a cluster, ``.[mpi]`` for mpirun."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (here / "megamtp" / "__init__.py").read_text()).group(1)

setup(
    name="megamtp",
    version=version,
    description="Megatron-style 3D-parallel pretraining for multi-token prediction",
    long_description=(here / "README.md").read_text(),
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    packages=find_packages(include=["megamtp", "megamtp.*"]),
    package_data={"megamtp.inference.native": ["*.c"], "megamtp.report": ["*.html"]},
    install_requires=[
        "torch>=2.11,<2.14",
        "deepspeed==0.19.8",
        "numpy>=1.26",
        "pydantic>=2.7",
        "pyyaml>=6",
        "safetensors>=0.4.3",
        "tensorboard>=2.16",
        "tokenizers>=0.19",
        "tqdm>=4.66",
    ],
    extras_require={
        # The exact pin takes a CPU build where one is offered; a looser range pulls the CUDA libraries.
        "cpu": ["torch==2.13.0"],
        "gpu": ["triton>=3.4"],
        "mpi": ["mpi4py>=4"],
        "plot": ["matplotlib>=3.8"],
        "report": ["plotly>=6", "jinja2>=3"],
        # Preprocessing: the fast encoder, faster JSON, zstd before Python 3.14, SentencePiece models, Parquet.
        "data": ["gigatoken>=0.10", "orjson>=3.10", 'backports.zstd>=1.0; python_version < "3.14"'],
        "data-formats": ["sentencepiece>=0.2", "pyarrow>=17"],
        # openmpi is mpirun and its libraries, 7 MB; a cluster brings its own, so the extra for it does not.
        "test": [
            "pytest>=8",
            "ruff>=0.6",
            "transformers>=4.45",
            "matplotlib>=3.8",
            "plotly>=6",
            "jinja2>=3",
            "mpi4py>=4",
            "openmpi>=5",
            "psutil>=5.9",
            # Whose interpreter runs the GPU's kernels on a CPU, and a library of such kernels.
            'triton>=3.4; platform_system == "Linux"',
            'liger-kernel>=0.8; platform_system == "Linux"',
        ],
    },
)
