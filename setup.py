"What pip reads. The facts stand in settings.ini; edit them there."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

parser = ConfigParser(delimiters=["="])
parser.read(Path(__file__).parent / "settings.ini", encoding="utf-8")
config = parser["DEFAULT"]

extras = {key.removesuffix("_requirements"): config[key].split() for key in config if key.endswith("_requirements")}
extras["all"] = sorted({requirement for needs in extras.values() for requirement in needs})

setup(
    version=config["version"],
    description=config["description"],
    author=config["author"],
    keywords=config["keywords"].split(),
    license="Apache-2.0",
    packages=find_packages(include=["gausssafe", "gausssafe.*"]),
    package_data={"gausssafe": ["data/*"]},
    include_package_data=True,
    install_requires=config["requirements"].split(),
    extras_require=extras,
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
    ],
    entry_points={
        "console_scripts": config["console_scripts"].split(),
        "jupyter_client.kernel_provisioners": ["gausssafe=gausssafe.provisioner:GuardProvisioner"],
        "pennylane.plugins": ["gausssafe.qubit=gausssafe.device:GausssafeQubit"],
        "papermill.engine": ["gausssafe=gausssafe.engine:PapermillEngine"],
        "nbdev": ["gausssafe=gausssafe._modidx:d"],
    },
)
