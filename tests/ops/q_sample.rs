use ddpm_cuda::config::Size;
use ddpm_cuda::data::{Dataset, Extent, Rows};
use ddpm_cuda::device::Device;
use ddpm_cuda::diffusion::{Batch, Kind, Schedule};
use ddpm_cuda::images::{Images, Source};
use ddpm_cuda::ops::q_sample::{Coefficients, Noised, q_sample, reference};
use ddpm_cuda::tensor::{DType, Shape};
use ddpm_cuda::train::{Feed, Resident};

use crate::support::{close, close_as, gpu, numbers, plant, same_bits, same_bits_at_any_number_of_threads};

/// Shapes of data sets: 4,096 elements are one task of the CPU path, 1,024 a block of the kernel.
const SETS: [Shape; 7] = [
    Shape::new(1, 1, 1, 1),
    Shape::new(5, 3, 7, 2),
    Shape::new(3, 28, 28, 1),
    Shape::new(4, 37, 41, 3),
    Shape::new(2, 64, 64, 1),
    Shape::new(2, 1, 4097, 1),
    Shape::new(3, 5, 205, 1),
];

fn pixels(len: usize) -> Vec<u8> {
    numbers(11, len).into_iter().map(|v| (v * 127.5 + 127.5).round() as u8).collect()
}

fn batch(set: Shape, n: usize) -> Batch {
    let indices = (0..n).map(|i| (3 * i + 1) % set.n).collect();
    Batch::train(99, 5, 2, indices, true, 1000)
}

fn on_cpu(images: Images<'_>, batch: &Batch, schedule: &Schedule) -> Noised {
    let device = Device::cpu_guarded();
    let coefficients = Coefficients::new(&device, schedule).unwrap();
    q_sample(&device, Source::Host(images), batch, &coefficients).unwrap()
}

#[test]
fn cpu_follows_the_reference() {
    let schedule = Schedule::new(Kind::Linear, 1000).unwrap();
    for shape in SETS {
        let pixels = pixels(shape.len());
        let images = Images { pixels: &pixels, shape };
        let batch = batch(shape, 7).with_labels(Some(vec![3, 0, 9, 1, 1, 16_777_216, 2]));
        let flip = batch.flip();
        assert!(flip.contains(&true) && flip.contains(&false), "both kinds: {flip:?}");
        let Noised { x_t, t, conditioning } = on_cpu(images, &batch, &schedule);
        assert_eq!(x_t.shape(), Shape { n: 7, ..shape });
        let labels = conditioning.labels().expect("a conditional batch");
        for (name, got, want) in [("t", &t, &batch.t()), ("labels", labels, batch.labels.as_ref().unwrap())] {
            assert_eq!(got.shape(), Shape::new(7, 1, 1, 1), "{name}");
            assert!(
                got.data().iter().zip(want).all(|(got, want)| f64::from(*got) == f64::from(*want)),
                "{name}: {got:?}"
            );
        }
        let oracle = reference::batch::<f64>(images, &batch, &schedule);
        let yardstick = reference::batch::<f32>(images, &batch, &schedule);
        println!("{shape}: {:.2} of the budget", close("x_t", x_t.data(), &oracle, &yardstick));
    }
}

/// At t = 0 there is little but the image: 0.01 of the noise, which never exceeds 6.77.
#[test]
fn the_least_noise_leaves_the_image_and_mirrors_it() {
    let schedule = Schedule::with_betas(Kind::Linear, 2, 1e-4, 0.02).unwrap();
    let shape = Shape::new(2, 3, 4, 2);
    let pixels: Vec<u8> = (0..shape.len()).map(|i| (5 * i) as u8).collect();
    let images = Images { pixels: &pixels, shape };
    let mut batches = (0..1000).map(|seed| Batch::train(seed, 0, 0, vec![1, 0], true, 2));
    let batch = batches.find(|batch| batch.t() == [0, 0] && batch.flip() == [false, true]);
    let batch = batch.expect("one in 16 is such a batch");
    let Noised { x_t, conditioning, .. } = on_cpu(images, &batch, &schedule);
    assert!(conditioning.labels().is_none(), "nobody gave any");
    let at = |n: usize, y: usize, x: usize, c: usize| ((n * 3 + y) * 4 + x) * 2 + c;
    for y in 0..3 {
        for x in 0..4 {
            for c in 0..2 {
                for (i, source) in [at(1, y, x, c), at(0, y, 3 - x, c)].into_iter().enumerate() {
                    let x_0 = f32::from(pixels[source]) / 127.5 - 1.0;
                    let got = x_t.data()[at(i, y, x, c)];
                    assert!((got - x_0).abs() < 0.068, "image {i} at {y}, {x}, {c}: {got}, expected about {x_0}");
                }
            }
        }
    }
}

#[test]
fn micro_batches_are_noised_like_the_whole_batch() {
    let schedule = Schedule::new(Kind::Cosine, 100).unwrap();
    let shape = SETS[1];
    let pixels = pixels(shape.len());
    let images = Images { pixels: &pixels, shape };
    let indices: Vec<usize> = vec![4, 0, 3, 3, 1];
    let whole = Batch::train(7, 12, 0, indices.clone(), true, 100);
    let whole = on_cpu(images, &whole, &schedule);
    let mut pieces = Vec::new();
    for (first, indices) in [(0, &indices[..2]), (2, &indices[2..])] {
        let piece = Batch::train(7, 12, first, indices.to_vec(), true, 100);
        pieces.extend_from_slice(on_cpu(images, &piece, &schedule).x_t.data());
    }
    same_bits("x_t", &pieces, whole.x_t.data());
}

#[test]
fn same_bits_with_any_number_of_threads() {
    let schedule = Schedule::new(Kind::Linear, 1000).unwrap();
    for shape in [SETS[2], SETS[3], SETS[5]] {
        let pixels = pixels(shape.len());
        same_bits_at_any_number_of_threads("x_t", || {
            on_cpu(Images { pixels: &pixels, shape }, &batch(shape, 7), &schedule).x_t.data().to_vec()
        });
    }
}

#[test]
fn an_empty_batch_is_empty() {
    let schedule = Schedule::new(Kind::Linear, 1000).unwrap();
    let images = Images { pixels: &[1, 2], shape: Shape::new(2, 1, 1, 1) };
    let none = Batch::train(0, 0, 0, Vec::new(), true, 1000);
    assert!(on_cpu(images, &none, &schedule).x_t.data().is_empty());
}

/// Asserts that t and labels have the CPU's bits, and if the CPU has fused multiply-adds also x_t, rounded to the
/// activation type. Returns x_t, t and labels in one vector.
fn same_as_the_cpu(name: &str, device: &Device, got: &Noised, want: &Noised) -> Vec<f32> {
    let numbers = |noised: &Noised| {
        let [x_t, t] = [&noised.x_t, &noised.t].map(|x| x.to_vec().unwrap());
        (x_t, t, noised.conditioning.labels().map_or(Vec::new(), |labels| labels.to_vec().unwrap()))
    };
    let dtype = device.activations();
    assert_eq!((got.x_t.shape(), got.x_t.dtype(), got.t.dtype()), (want.x_t.shape(), dtype, DType::F32), "{name}");
    let ((x_t, t, labels), want) = (numbers(got), numbers(want));
    same_bits(&format!("{name}, t"), &t, &want.1);
    same_bits(&format!("{name}, labels"), &labels, &want.2);
    if gpu::cpu_fuses() {
        same_bits(&format!("{name}, x_t"), &x_t, &gpu::rounded_f32(dtype, &want.0));
    }
    [x_t, t, labels].concat()
}

/// A data set of these images.
fn data_set(images: Images<'_>) -> Dataset {
    let Shape { h, w, c, .. } = images.shape;
    Dataset::new(Extent { size: Size { h, w }, channels: c }, images.pixels.to_vec(), None)
}

/// Noises the batch's images from a data set on the GPU.
fn on_gpu(device: &Device, images: Images<'_>, batch: &Batch, schedule: &Schedule) -> Noised {
    let Device::Cuda(gpu) = device else { panic!("{device} is no GPU") };
    let mut feed = Feed::new(device, Some(&Resident::new(gpu, images).unwrap()));
    let rows = batch.indices.iter().map(|&i| i as u32).collect();
    let rows = Rows { rows, classes: batch.labels.clone() };
    let data = data_set(images);
    let source = feed.source(&data, 0..batch.len() as u64, |_| rows.clone()).unwrap();
    q_sample(device, source, batch, &Coefficients::new(device, schedule).unwrap()).unwrap()
}

#[test]
fn gpu_has_the_bits_of_the_cpu() {
    let schedule = Schedule::new(Kind::Linear, 1000).unwrap();
    for shape in SETS {
        let pixels = pixels(shape.len());
        let images = Images { pixels: &pixels, shape };
        let labelled = batch(shape, 7).with_labels(Some(vec![3, 0, 9, 1, 1, 16_777_216, 2]));
        let unmirrored = Batch::validation(99, 3, (0..7).map(|i| i % shape.n).collect(), 1000);
        // A seed and a step that use their high bits.
        let far = Batch::train(0xFEDC_BA98_7654_3210, 0x8000_0001, 1 << 20, vec![0; 2], true, 1000);
        for batch in [labelled, unmirrored, far] {
            let want = on_cpu(images, &batch, &schedule);
            let oracle = reference::batch::<f64>(images, &batch, &schedule);
            let yardstick = reference::batch::<f32>(images, &batch, &schedule);
            gpu::each(&format!("q_sample of {shape}"), |device| {
                let got = on_gpu(device, images, &batch, &schedule);
                close_as(device.activations(), "x_t", &got.x_t.to_vec().unwrap(), &oracle, &yardstick);
                same_as_the_cpu(&format!("q_sample of {shape}"), device, &got, &want)
            });
        }
    }
}

/// Chains of other lengths, down to two steps.
#[test]
fn gpu_draws_timesteps_as_the_cpu_does() {
    let shape = Shape::new(1, 1, 1, 1);
    let images = Images { pixels: &[200], shape };
    for timesteps in [2, 3, 250, 4000] {
        let schedule = Schedule::new(Kind::Cosine, timesteps).unwrap();
        let batch = Batch::train(5, 6, 7, vec![0; 300], true, timesteps as u32);
        gpu::each("timesteps", |device| {
            let (got, want) = (on_gpu(device, images, &batch, &schedule), on_cpu(images, &batch, &schedule));
            same_as_the_cpu(&format!("{timesteps} timesteps"), device, &got, &want)
        });
    }
}

/// Timesteps that are given or stratified, and labels of which some are dropped.
#[test]
fn gpu_takes_timesteps_and_drops_labels_as_the_cpu_does() {
    let schedule = Schedule::new(Kind::Linear, 1000).unwrap();
    let shape = SETS[1];
    let pixels = pixels(shape.len());
    let images = Images { pixels: &pixels, shape };
    let labels = Some((0..40).map(|i| i % 10).collect());
    let indices = (0..40).map(|i| i % shape.n).collect();
    let batch = Batch::train(5, 6, 24, indices, true, 1000).with_labels(labels).dropping(0.5, 10);
    let seen = batch.labels().unwrap();
    assert!(seen.contains(&10) && seen.iter().filter(|&&label| label != 10).count() > 5, "{seen:?}");
    let given = batch.clone().at((0..40).map(|i| 999 - 25 * i).collect());
    for batch in [given, batch.stratified(64)] {
        gpu::each("timesteps", |device| {
            let (got, want) = (on_gpu(device, images, &batch, &schedule), on_cpu(images, &batch, &schedule));
            let t: Vec<f32> = batch.t().into_iter().map(|t| t as f32).collect();
            same_bits("t", want.t.data(), &t);
            same_as_the_cpu("timesteps", device, &got, &want)
        });
    }
}

/// More images than the 65,535 blocks that a grid can have along y.
#[test]
fn gpu_loops_over_images() {
    let Some(gpu) = gpu::gpu(DType::F32) else { return };
    let (device, shape) = (Device::Cuda(gpu), Shape::new(11, 1, 2, 3));
    let schedule = Schedule::new(Kind::Linear, 1000).unwrap();
    let pixels = pixels(shape.len());
    let (images, batch) = (Images { pixels: &pixels, shape }, batch(shape, 65_537));
    let (got, want) = (on_gpu(&device, images, &batch, &schedule), on_cpu(images, &batch, &schedule));
    same_as_the_cpu("65,537 images", &device, &got, &want);
}

/// Batches of one sequence, from a data set on the GPU whose image indices are uploaded 2^16 at a time (the third batch
/// here begins in one window and ends in the next), and from a data set on the host whose batches are uploaded one by
/// one. Both must give what the CPU reads itself.
#[test]
fn gpu_is_fed_the_batches_of_the_cpu() {
    let schedule = Schedule::new(Kind::Linear, 1000).unwrap();
    let shape = Shape::new(13, 3, 5, 2);
    let pixels = pixels(shape.len());
    let images = Images { pixels: &pixels, shape };
    let row = |place: u64| (place * 7 + place / 13) % 13;
    let class = |place: u64| (place % 5) as u32;
    let batch = |places: std::ops::Range<u64>| {
        let (indices, labels) =
            (places.clone().map(|p| row(p) as usize).collect(), places.clone().map(class).collect());
        Batch::train(1, (places.start / 6) as u32, 0, indices, true, 1000).with_labels(Some(labels))
    };
    let rows = |places: std::ops::Range<u64>| Rows {
        rows: places.clone().map(|p| row(p) as u32).collect(),
        classes: Some(places.map(class).collect()),
    };
    // 65,536 = 10,922 * 6 + 4.
    let starts = [0, 6, 65_532, 65_538, 65_544, 12, 200_000];
    gpu::each("feed", |device| {
        let Device::Cuda(gpu) = device else { panic!("{device} is no GPU") };
        let coefficients = Coefficients::new(device, &schedule).unwrap();
        let (resident, data) = (Resident::new(gpu, images).unwrap(), data_set(images));
        let mut all = Vec::new();
        for (name, resident) in [("resident", Some(&resident)), ("staged", None)] {
            let mut feed = Feed::new(device, resident);
            let mut asked = 0;
            for first in starts {
                let places = first..first + 6;
                let source = feed.source(&data, places.clone(), |places| {
                    asked += 1;
                    rows(places)
                });
                let got = q_sample(device, source.unwrap(), &batch(places.clone()), &coefficients).unwrap();
                let want = on_cpu(images, &batch(places.clone()), &schedule);
                all.push(same_as_the_cpu(&format!("{name}, images {places:?}"), device, &got, &want));
            }
            // A window covers 2^16 positions from the one requested: 0, 65,532, back to 12, and 200,000.
            assert_eq!(asked, if resident.is_some() { 4 } else { starts.len() }, "{name}: rows were asked for");
        }
        all.concat()
    });
}

#[test]
fn planted_bugs_are_noticed() {
    let test = "q_sample::gpu_has_the_bits_of_the_cpu";
    // Races on an image's draws; flips from the streams of the timesteps; the wrong width; another rounding; another
    // place in the row where a mirrored block begins; classes as image indices.
    plant::notices_lost_barrier(test, "q_sample_fwd_f32", 0);
    plant::notices_lost_barrier("q_sample::gpu_loops_over_images", "q_sample_fwd_f32", 1);
    plant::notices_wrong_parameter(test, "q_sample_fwd_bf16", 14, 13);
    plant::notices_wrong_parameter(test, "q_sample_fwd_f32", 10, 9);
    plant::notices(test, "q_sample_fwd_f32", "fma.rn.f32", "fma.rz.f32");
    plant::notices(test, "q_sample_fwd_f32", "rem.u32", "div.u32");
    plant::notices_wrong_parameter("q_sample::gpu_is_fed_the_batches_of_the_cpu", "q_sample_fwd_f32", 4, 5);
    plant::notices_lost_block(test, "q_sample_fwd_f32");
    // Drawn timesteps that are taken as given; labels dropped by the streams of the flips; strata of a micro-batch.
    let test = "q_sample::gpu_takes_timesteps_and_drops_labels_as_the_cpu_does";
    plant::notices_wrong_parameter(test, "q_sample_fwd_f32", 17, 18);
    plant::notices_wrong_parameter(test, "q_sample_fwd_bf16", 18, 14);
    plant::notices_wrong_parameter(test, "q_sample_fwd_f32", 16, 7);
}
