"""Turns image data sets into TFRecord shards with a manifest; never imports TensorFlow or Keras."""
