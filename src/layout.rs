//! Conversion between the channels-last order in memory and the channels-first order (NCHW, OIHW) of other tools'
//! files.

/// `(n, c, h, w)` to `(n, h, w, c)`, with `pixels = h*w`; also OIHW to `(c_out, kh, kw, c_in)`.
pub fn to_channels_last<T: Copy>(x: &[T], c: usize, pixels: usize) -> Vec<T> {
    transpose_images(x, c, pixels)
}

/// `(n, h, w, c)` to `(n, c, h, w)`, with `pixels = h*w`; also `(c_out, kh, kw, c_in)` to OIHW.
pub fn to_channels_first<T: Copy>(x: &[T], c: usize, pixels: usize) -> Vec<T> {
    transpose_images(x, pixels, c)
}

/// Transposes each `(rows, columns)` matrix of `x`.
fn transpose_images<T: Copy>(x: &[T], rows: usize, columns: usize) -> Vec<T> {
    let len = rows * columns;
    assert!(len > 0 && x.len().is_multiple_of(len), "{} numbers are not whole matrices of {rows}x{columns}", x.len());
    let mut y = Vec::with_capacity(x.len());
    for image in x.chunks_exact(len) {
        for column in 0..columns {
            y.extend((0..rows).map(|row| image[row * columns + column]));
        }
    }
    y
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn channels_change_places_and_come_back() {
        // Two images, two channels, three pixels: value = 100 n + 10 c + p.
        let first = [0, 1, 2, 10, 11, 12, 100, 101, 102, 110, 111, 112];
        let last = to_channels_last(&first, 2, 3);
        assert_eq!(last, [0, 10, 1, 11, 2, 12, 100, 110, 101, 111, 102, 112]);
        assert_eq!(to_channels_first(&last, 2, 3), first);
    }
}
