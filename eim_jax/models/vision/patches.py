"""Pictures cut into patches, as every vision tower here reads them."""

from jaxtyping import Array, Float


def flat_patches(
    pixels: Float[Array, "b h w 3"], image_size: int, patch_size: int, tower: str
) -> Float[Array, "b n p p 3"]:
    """Returns an image's patches, row by row; pixels beyond the last whole patch are left out, as a convolution does.

    A convolution whose stride is its kernel size is one matmul over them.

    Raises:
      ValueError: images of another size than the tower's; `tower` is its name, for the message.
    """
    if pixels.shape[1:3] != (image_size, image_size):
        raise ValueError(f"images are {pixels.shape[1:3]}, this {tower} sees {image_size} x {image_size}")
    b, p, side = pixels.shape[0], patch_size, image_size // patch_size
    patches = pixels[:, : side * p, : side * p].reshape(b, side, p, side, p, 3).transpose(0, 1, 3, 2, 4, 5)
    return patches.reshape(b, side * side, p, p, 3)
