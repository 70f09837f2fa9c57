"""The torchtitan home: its decoder with expert layers. Importing the package makes torchtitan run on this machine."""

from lamella.titan import device as _device

_device.install()
