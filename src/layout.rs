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

/// Transposes each `(rows, columns)` matrix of `x`; of no numbers it gives none, also where an extent is 0.
fn transpose_images<T: Copy>(x: &[T], rows: usize, columns: usize) -> Vec<T> {
    let len = rows * columns;
    assert!(x.len().is_multiple_of(len), "{} numbers are not whole matrices of {rows}x{columns}", x.len());
    let mut y = Vec::with_capacity(x.len());
    for image in x.chunks_exact(len.max(1)) {
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

    #[test]
    fn no_numbers_stay_none() {
        for (c, pixels) in [(3, 4), (0, 4), (3, 0), (0, 0)] {
            assert!(to_channels_last::<u8>(&[], c, pixels).is_empty());
            assert!(to_channels_first::<u8>(&[], c, pixels).is_empty());
        }
    }

    #[test]
    #[should_panic(expected = "5 numbers are not whole matrices of 3x0")]
    fn numbers_are_not_matrices_without_columns() {
        to_channels_last(&[0; 5], 3, 0);
    }
}
