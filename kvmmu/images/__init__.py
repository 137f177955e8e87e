"""Openers of memory images: dumps of virtual machines and of whole computers, told apart by what is in the file."""
# Below: arch._bits, arch.arguments, arch.extras, arch.files, arch.registers, memory, vm
# Order: _file, _unmapped, _flat, _vmcoreinfo, image, elfcore, kdump, raw, lime, avml, windows, vmware, reader,
#     opening

from kvmmu.images._file import ImageError
from kvmmu.images.image import Image, VcpuState
from kvmmu.images.opening import image_formats, is_image, open_image

__all__ = ["Image", "ImageError", "VcpuState", "image_formats", "is_image", "open_image"]
