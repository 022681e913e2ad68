//! Fits an image to the size and channels of a model: converts grey to colour or back, crops the largest centred
//! rectangle of the right aspect, then resizes it with a three-lobed Lanczos filter, widened when shrinking so that
//! nothing aliases. What shrinks by 32 or more is first averaged in squares, so that at least 16 are left to the
//! filter, whose work grows with the area it reads: this changes a pixel by a few levels at most.

use image::GrayImage;
use image::imageops::{FilterType, resize};

use super::Extent;
use crate::config::Size;

/// Refuses a conversion that [`fit`] cannot do; the error is the end of a sentence that begins with the file.
pub fn check_channels(from: usize, to: usize) -> std::result::Result<(), String> {
    if from == to || matches!((from, to), (1, 3) | (3, 1)) {
        return Ok(());
    }
    Err(format!(
        "has {from} channels, but {to} are asked for; only 1 (grey) and 3 (colour) can be converted, so use --set channels={from}"
    ))
}

/// Fits `image`, `(h, w, c)` bytes of extent `from`, to extent `to`.
pub fn fit(image: &[u8], from: Extent, to: Extent) -> Vec<u8> {
    assert_eq!(image.len(), from.len(), "{} bytes for an image of {from}", image.len());
    let coloured = convert(image, from.channels, to.channels);
    if from.size == to.size { coloured } else { crop_and_resize(&coloured, from.size, to) }
}

fn convert(image: &[u8], from: usize, to: usize) -> Vec<u8> {
    match (from, to) {
        (a, b) if a == b => image.to_vec(),
        (1, 3) => image.iter().flat_map(|&grey| [grey; 3]).collect(),
        (3, 1) => image.chunks_exact(3).map(luma).collect(),
        (a, b) => unreachable!("{a} channels to {b}: asked for without check_channels()"),
    }
}

/// Rec. 601 luma, rounded: the usual conversion to grey.
fn luma(rgb: &[u8]) -> u8 {
    let [r, g, b] = [0, 1, 2].map(|c| u32::from(rgb[c]));
    ((299 * r + 587 * g + 114 * b + 500) / 1000) as u8
}

/// The largest centred rectangle of `from` with the aspect of `to`: (top, left, its size).
fn centre(from: Size, to: Size) -> (usize, usize, Size) {
    // Compared as products, so that equal aspects crop nothing.
    let cropped = if from.w * to.h > from.h * to.w {
        Size { h: from.h, w: (from.h * to.w / to.h).max(1) }
    } else {
        Size { h: (from.w * to.h / to.w).max(1), w: from.w }
    };
    ((from.h - cropped.h) / 2, (from.w - cropped.w) / 2, cropped)
}

fn crop_and_resize(image: &[u8], from: Size, to: Extent) -> Vec<u8> {
    let (top, left, cropped) = centre(from, to.size);
    let c = to.channels;
    let square = square(cropped, to.size);
    let (h, w) = (cropped.h / square, cropped.w / square);
    // The rows and columns that no whole square covers are shared out to both edges.
    let (top, left) = (top + cropped.h % square / 2, left + cropped.w % square / 2);
    let mut out = vec![0; to.len()];
    for channel in 0..c {
        let plane =
            GrayImage::from_raw(w as u32, h as u32, plane(image, from.w, c, channel, (top, left), (h, w), square))
                .expect("a byte for each pixel");
        let plane = resize(&plane, to.size.w as u32, to.size.h as u32, FilterType::Lanczos3);
        for (pixel, &value) in out.chunks_exact_mut(c).zip(plane.as_raw()) {
            pixel[channel] = value;
        }
    }
    out
}

/// Side of the squares that are averaged: 1 unless both sides shrink by 32 or more.
fn square(from: Size, to: Size) -> usize {
    let shrinks = (from.h / to.h).min(from.w / to.w);
    if shrinks < 32 { 1 } else { shrinks / 16 }
}

/// A channel of the part of `image` that begins at `(top, left)`: the means, rounded, of `h x w` squares.
fn plane(
    image: &[u8],
    columns: usize,
    channels: usize,
    channel: usize,
    (top, left): (usize, usize),
    (h, w): (usize, usize),
    square: usize,
) -> Vec<u8> {
    let area = (square * square) as u32;
    let mut plane = Vec::with_capacity(h * w);
    let mut sums = vec![0u32; w];
    for row in 0..h {
        sums.fill(0);
        for y in 0..square {
            let start = ((top + row * square + y) * columns + left) * channels;
            let line = &image[start..start + w * square * channels];
            for (sum, pixels) in sums.iter_mut().zip(line.chunks_exact(square * channels)) {
                *sum += pixels.iter().skip(channel).step_by(channels).map(|&v| u32::from(v)).sum::<u32>();
            }
        }
        plane.extend(sums.iter().map(|sum| ((sum + area / 2) / area) as u8));
    }
    plane
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(h: usize, w: usize, channels: usize) -> Extent {
        Extent { size: Size { h, w }, channels }
    }

    #[test]
    fn crops_the_middle() {
        assert_eq!(centre(Size { h: 10, w: 30 }, Size::square(5)), (0, 10, Size::square(10)));
        assert_eq!(centre(Size { h: 30, w: 10 }, Size::square(5)), (10, 0, Size::square(10)));
        assert_eq!(centre(Size { h: 28, w: 28 }, Size::square(32)), (0, 0, Size::square(28)));
        assert_eq!(centre(Size { h: 1000, w: 1 }, Size { h: 1, w: 1000 }), (499, 0, Size { h: 1, w: 1 }));
        assert_eq!(centre(Size { h: 14, w: 10 }, Size { h: 28, w: 20 }), (0, 0, Size { h: 14, w: 10 }));
    }

    #[test]
    fn a_flat_image_stays_flat_and_the_crop_takes_the_middle() {
        // Left and right thirds black, the middle one colour: the crop leaves a flat image.
        let image: Vec<u8> =
            (0..12 * 36).flat_map(|i| if (12..24).contains(&(i % 36)) { [200, 10, 7] } else { [0; 3] }).collect();
        for side in [4, 5, 12, 31] {
            let out = fit(&image, extent(12, 36, 3), extent(side, side, 3));
            assert!(out.chunks(3).all(|p| p == [200, 10, 7]), "side {side}: {:?}", &out[..6]);
        }
    }

    #[test]
    fn shrinking_averages_instead_of_dropping_pixels() {
        // Stripes one pixel wide: a filter that picks single pixels returns 0 or 255.
        let image: Vec<u8> = (0..64 * 64).map(|i| if i % 2 == 0 { 0 } else { 255 }).collect();
        let out = fit(&image, extent(64, 64, 1), extent(16, 16, 1));
        let inner: Vec<u8> = (4..12).flat_map(|r| out[r * 16 + 4..r * 16 + 12].to_vec()).collect();
        assert!(inner.iter().all(|&v| (120..=135).contains(&v)), "{inner:?}");
    }

    /// The negative lobes of the filter make an edge overshoot; filters without them stay between the two sides.
    #[test]
    fn an_edge_overshoots_as_with_lanczos() {
        let image: Vec<u8> = (0..32 * 32).map(|i| if i % 32 < 15 { 50 } else { 200 }).collect();
        for side in [16, 48] {
            let out = fit(&image, extent(32, 32, 1), extent(side, side, 1));
            let (least, most) = (out.iter().min().unwrap(), out.iter().max().unwrap());
            assert!(*least < 47 && *most > 203, "from {least} to {most} at side {side}");
        }
    }

    #[test]
    fn grey_and_colour() {
        assert_eq!(fit(&[7, 9], extent(1, 2, 1), extent(1, 2, 3)), [7, 7, 7, 9, 9, 9]);
        assert_eq!(fit(&[255, 0, 0, 0, 255, 0, 0, 0, 255], extent(1, 3, 3), extent(1, 3, 1)), [76, 150, 29]);
        assert_eq!(luma(&[255; 3]), 255);
        let accepted = |from, to| check_channels(from, to).is_ok();
        assert!(accepted(2, 2) && accepted(1, 3) && accepted(3, 1) && !accepted(4, 3) && !accepted(2, 1));
    }

    /// Many times smaller: the means of squares first, which hardly changes the result.
    #[test]
    fn a_large_image_is_averaged_first() {
        assert_eq!([31, 32, 47, 48, 320].map(|n| square(Size::square(n * 8), Size::square(8))), [1, 2, 2, 3, 20]);
        assert_eq!(square(Size { h: 3200, w: 100 }, Size { h: 10, w: 10 }), 1, "one side hardly shrinks");
        let (h, w) = (1100, 1640);
        let value = |y: usize, x: usize, c: usize| {
            let wave = (x as f64 / 90.0 + c as f64).sin() + (y as f64 / 140.0).cos();
            (128.0 + 50.0 * wave) as u8 ^ ((x * 7 + y * 13) % 8) as u8
        };
        let image: Vec<u8> = (0..h * w * 3).map(|i| value(i / 3 / w, i / 3 % w, i % 3)).collect();
        let (from, to) = (extent(h, w, 3), extent(20, 30, 3));
        let out = fit(&image, from, to);
        // The filter alone.
        let (top, left, cropped) = centre(from.size, to.size);
        assert_eq!((cropped, square(cropped, to.size)), (Size { h: 1093, w: 1640 }, 3));
        for c in 0..3 {
            let pixel = |x: u32, y: u32| image::Luma([image[((top + y as usize) * w + left + x as usize) * 3 + c]]);
            let whole = GrayImage::from_fn(cropped.w as u32, cropped.h as u32, pixel);
            let want = resize(&whole, 30, 20, FilterType::Lanczos3);
            let off = want.as_raw().iter().zip(out.iter().skip(c).step_by(3)).map(|(&a, &b)| a.abs_diff(b)).max();
            assert!(off <= Some(2), "channel {c} is off by {off:?}");
        }
    }

    /// Resizing is a part of the data: other bits would make a resumed run see other images.
    #[test]
    fn the_bits_of_a_resized_image_are_pinned() {
        let image: Vec<u8> = (0..90 * 70 * 3).map(|i: usize| (i * i / 97 + i * 31) as u8).collect();
        let hash = |h, w, c| twox_hash::XxHash3_128::oneshot(&fit(&image, extent(70, 90, 3), extent(h, w, c)));
        let found = [hash(32, 32, 3), hash(100, 64, 3), hash(16, 48, 1), hash(2, 2, 3)];
        let recorded = [
            0xe79a91947f9645db98d192ecfa7476ab,
            0xc7ce78d0c33e7ae51901e5ef6d154d24,
            0xb433501c0ed2feaf70f3ee03ea383b69,
            0x6b0b616283060f47a30e173532cd2d4e,
        ];
        assert_eq!(found, recorded);
    }
}
