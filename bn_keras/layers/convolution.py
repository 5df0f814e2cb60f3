"""A convolution whose gradient to the kernel is fast on a CPU."""

import keras

from bn_keras.layers.moments import only_cpus


@keras.saving.register_keras_serializable(package="bn_keras")
class Conv2D(keras.layers.Conv2D):
    """`keras.layers.Conv2D` in all that it computes.

    In training on a CPU, 40% of a step of the full-size network is TensorFlow's gradient to the kernels, which takes
    two to three times as long as the convolution itself for as many operations. Here it is matrix products, one for
    each position of a 1x1 or 3x3 kernel, of the same two matrices at different offsets.
    """

    def call(self, inputs, training=None):
        # Only in training: a convolution with a gradient of its own does not take in the normalization after it, which
        # makes inference of the full-size network 1.1 times slower.
        if not training or not self._products_pay(inputs):
            return super().call(inputs)
        outputs = _convolve(inputs, self.kernel)
        return self.activation(outputs + self.bias if self.use_bias else outputs)

    def _products_pay(self, inputs):
        """Whether the kernel, device and backend are such that the matrix products are faster."""
        if keras.backend.backend() != "tensorflow" or self.compute_dtype != "float32":
            return False
        plain = self.strides == (1, 1) and self.dilation_rate == (1, 1) and self.groups == 1
        if (
            self.kernel_size not in ((1, 1), (3, 3))
            or not plain
            or self.padding != "same"
            or self.data_format != "channels_last"
        ):
            return False
        # Rows of whole cache lines, so that a matrix at an offset is no copy; and more work than nine small operations.
        channels = inputs.shape[-1]
        return channels >= 64 and channels % 16 == 0 and only_cpus()


def _convolve(inputs, kernel):
    """inputs [N, H, W, C] by kernel [1, 1, C, maps] or [3, 3, C, maps], stride 1, padding SAME."""
    import tensorflow as tf

    gradient_to_kernel = _gradient_to_1x1 if kernel.shape[0] == 1 else _gradient_to_3x3

    @tf.custom_gradient
    def convolve(inputs, kernel):
        def gradient(outputs_gradient):
            to_inputs = tf.nn.conv2d_transpose(outputs_gradient, kernel, tf.shape(inputs), 1, "SAME")
            return to_inputs, gradient_to_kernel(inputs, outputs_gradient)

        return tf.nn.conv2d(inputs, kernel, 1, "SAME"), gradient

    return convolve(inputs, tf.convert_to_tensor(kernel))


def _gradient_to_1x1(inputs, outputs_gradient):
    """`sum over n, h, w of inputs[n, h, w, c] * outputs_gradient[n, h, w, k]` as [1, 1, c, k]."""
    import tensorflow as tf

    pixels = tf.reshape(inputs, [-1, inputs.shape[-1]])
    gradients = tf.reshape(outputs_gradient, [-1, outputs_gradient.shape[-1]])
    return tf.matmul(pixels, gradients, transpose_a=True)[tf.newaxis, tf.newaxis]


def _gradient_to_3x3(inputs, outputs_gradient):
    """`sum over n, h, w of inputs[n, h+i-1, w+j-1, c] * outputs_gradient[n, h, w, k]` as [3, 3, c, k].

    Both get a column and a row of zeros at the end of every image, which are also the border before the next row and
    image, and become matrices of one row a pixel. A step of the kernel is then a step of rows.
    """
    import tensorflow as tf

    border = [[0, 0], [0, 1], [0, 1], [0, 0]]
    inputs, outputs_gradient = tf.pad(inputs, border), tf.pad(outputs_gradient, border)
    width = tf.shape(inputs)[2]
    pixels = tf.reshape(inputs, [-1, inputs.shape[-1]])
    gradients = tf.reshape(outputs_gradient, [-1, outputs_gradient.shape[-1]])
    count = tf.shape(pixels)[0]

    def product(row, column):
        offset = (row - 1) * width + (column - 1)
        ahead, behind = tf.maximum(offset, 0), tf.maximum(-offset, 0)
        return tf.matmul(pixels[ahead : count - behind], gradients[behind : count - ahead], transpose_a=True)

    return tf.stack([tf.stack([product(row, column) for column in range(3)]) for row in range(3)])
