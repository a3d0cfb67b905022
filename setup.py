"""Packaging of effkernels (fused MBConv kernels) and efficientnet (the model family); tested versions are in
constraints.txt.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (ROOT / "effkernels/__init__.py").read_text(encoding="utf-8"), re.MULTILINE
).group(1)

TRAIN = [
    "scikit-learn>=1.3",
    "tqdm>=4.60",
    "safetensors>=0.4",
    "pillow>=9.1",
    "matplotlib>=3.7",
    "tensorboard>=2.13",
    "torchvision>=0.24",
    "huggingface_hub>=0.23",
    "webdataset>=1.0",
    'tomli>=2; python_version < "3.11"',
]
EXPORT = ["onnx>=1.20", "onnxscript>=0.5", "onnxruntime>=1.23"]
TEST = [
    "pytest>=7.4",
    "pytest-benchmark>=4.0",
    "pytest-xdist>=3.5",
    "filelock>=3.12",
    "hypothesis>=6.140",
    "ruff>=0.9",
    "vermin>=1.6",
    "timm>=1.0.9",
    "efficientnet_pytorch>=0.7.1",
    "transformers>=5.0",
    "pyyaml>=6.0",
]

setup(
    name="effkernels",
    version=VERSION,
    description="Fused Triton kernels for EfficientNet's MBConv blocks, and the EfficientNet family on top of them",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["effkernels*", "efficientnet*"]),
    package_data={"effkernels": ["**/*.json"], "efficientnet": ["training/recipes/*.toml"]},
    python_requires=">=3.10",
    install_requires=["torch>=2.9", 'triton>=3.5; platform_system == "Linux"', "numpy>=1.26"],
    extras_require={"train": TRAIN, "export": EXPORT, "test": TRAIN + EXPORT + TEST},
    entry_points={"console_scripts": ["efficientnet = efficientnet.cli:main"]},
    classifiers=[
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in (10, 11, 12, 13)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
