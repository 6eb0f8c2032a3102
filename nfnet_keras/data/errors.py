"""The error that every problem with the user's data is reported by."""


class DataError(ValueError):
    """A problem with the user's data.

    The message is one line: what was wrong, the value or path, and what to do about it.

    Example:
        >>> from nfnet_keras.data import DataError, image_folder
        >>> try:
        ...     image_folder("/no/such/folder")
        ... except DataError as error:
        ...     print("does not exist" in str(error))
        True
    """
