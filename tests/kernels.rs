//! The compiled kernels: they are assembled for every architecture without spills, old drivers know their PTX, the best
//! image for a GPU is chosen, and a launch that does not fit a kernel's parameters is refused before it reaches the
//! driver.

mod support;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

use bytemuck::Zeroable;
use ddpm_cuda::config::{Config, Preset, Size};
use ddpm_cuda::data::{Data, Dataset, Extent};
use ddpm_cuda::device::cuda::tile::{
    FMA, MMA_64, MMA_64_ANY, MMA_128, MULTIPROCESSORS, RESIDENT, SplitK, choose, ring, split_in,
};
use ddpm_cuda::device::cuda::{Gpu, Launched};
use ddpm_cuda::device::{Device, Precision};
use ddpm_cuda::kernels::{self, Image, Kernel, Kind, MODULES, best_image, entry_alone, parameters};
use ddpm_cuda::ops::attention::attention;
use ddpm_cuda::ops::conv2d::{Geometry, Pad, Plus, conv2d};
use ddpm_cuda::ops::linear::linear;
use ddpm_cuda::params::Layout;
use ddpm_cuda::profile::Launch;
use ddpm_cuda::profile::card::Multiprocessor;
use ddpm_cuda::tensor::{DType, Shape, Tensor};
use ddpm_cuda::train::Trainer;
use ddpm_cuda::unet::UNet;

use support::{gpu, numbers, through_tape_on, to_f32};

/// Entries that may use local memory, with the reason.
const LOCAL_MEMORY: [(&str, &str); 0] = [];

/// The build has assembled each of them for A100, RTX 30, RTX 40, H100, B200 and RTX 50, as far as its compiler knows
/// these, and noted what the assembler said.
#[test]
fn every_entry_is_assembled_for_every_architecture_without_local_memory() {
    if !gpu::available() {
        return;
    }
    let wanted = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)];
    let compiler = kernels::COMPILER.expect("kernels are available");
    // CUDA knows the last two since 12.8.
    let known = if compiler.starts_with("12.") && !compiler.starts_with("12.8") && !compiler.starts_with("12.9") {
        &wanted[..4]
    } else {
        &wanted[..]
    };
    assert!(known.iter().all(|code| kernels::MACHINE_CODE.contains(code)), "{:?} of {compiler}", kernels::MACHINE_CODE);
    let mut bad = Vec::new();
    for kernel in kernels::ALL.iter().filter(|kernel| !LOCAL_MEMORY.iter().any(|(entry, _)| *entry == kernel.name)) {
        for (used, (major, minor)) in kernel.resources.iter().zip(kernels::MACHINE_CODE) {
            if used.local > 0 {
                bad.push(format!("{} for sm_{major}{minor}: {} bytes of local memory", kernel.name, used.local));
            }
        }
    }
    assert!(bad.is_empty(), "{}", bad.join("\n"));
}

/// Registers of a thread, bytes of shared memory of a block with `dynamic` bytes, and how many blocks a multiprocessor
/// holds.
fn resident(kernel: &Kernel, of: &Multiprocessor, dynamic: usize) -> (u32, usize, usize) {
    let used = kernel.resources_on(of.capability).expect("the compiler knows the GPUs of the table");
    let shared = used.shared as usize + dynamic;
    (used.registers, shared, of.resident(kernel.max_threads as usize, used.registers as usize, shared))
}

/// Split-K counts on six blocks of a weight's gradient, sampling on eight of 64x64 forward.
#[test]
fn a_multiprocessor_holds_as_many_tiles_as_is_counted_on() {
    if !gpu::available() {
        return;
    }
    for (stem, of) in ["conv2d", "linear"].into_iter().flat_map(|stem| Multiprocessor::ALL.map(move |of| (stem, of))) {
        let tiles: Vec<&Kernel> =
            kernels::ALL.iter().filter(|k| k.module.stem == stem && k.tile.is_some()).copied().collect();
        let tiles: Vec<&Kernel> = tiles.into_iter().filter(|k| !k.name.contains("_mma_")).collect();
        assert_eq!(tiles.len(), 12, "tiled kernels of {stem} in f32 and tf32");
        for kernel in tiles {
            let (registers, shared, resident) = resident(kernel, &of, 0);
            let said = format!(
                "{} on {:?}: {registers} registers, {shared} bytes, {resident} blocks",
                kernel.name, of.capability
            );
            println!("{said}");
            let on_fma = kernel.name.ends_with("_f32");
            let eight = on_fma && stem == "conv2d" && kernel.tile == Some((64, 64)) && !kernel.name.contains("wgrad");
            let at_least = if eight { kernels::tile_gemm::RESIDENT as usize } else { RESIDENT };
            let exact = on_fma && kernel.name.contains("wgrad_64x64");
            assert!(resident == at_least || !exact && resident > at_least, "{said}");
        }
    }
}

/// Split-K counts on this many blocks of a weight's gradient on tensor cores.
#[test]
fn a_multiprocessor_holds_as_many_tensor_core_tiles_as_is_counted_on() {
    if !gpu::available() {
        return;
    }
    for stem in ["conv2d", "linear"] {
        for (gpu, capability) in [(8, 0), (8, 9), (9, 0)].into_iter().enumerate() {
            let of = Multiprocessor::of(capability).expect("a GPU of the table");
            let of_stem = kernels::ALL.iter().filter(|k| k.module.stem == stem);
            for kernel in of_stem.filter(|k| k.name.contains("_wgrad_mma_") || k.name.contains("bwd_mma_")) {
                // The last tile in the name is that of the weight's gradient.
                let side = if kernel.name.ends_with("128x128") { 128 } else { 64 };
                let more = if stem == "conv2d" { kernels::conv2d_mma::ORIGINS as usize } else { 0 };
                let dynamic = ring(side, side) + more;
                let (registers, bytes, resident) = resident(kernel, of, dynamic);
                assert_eq!(bytes, dynamic, "{}: its shared memory is dynamic", kernel.name);
                let small = if kernel.name.contains("_any") { MMA_64_ANY } else { MMA_64 };
                let blocks = if side == 128 { MMA_128 } else { small };
                let counted = blocks.slots[gpu] / MULTIPROCESSORS[gpu];
                let name = kernel.name;
                println!("{name} on {capability:?}: {registers} registers, {bytes} bytes, {resident} blocks");
                assert!(resident >= counted, "{name} on {capability:?}: {resident} blocks, counted on {counted}");
            }
        }
    }
}

/// The table has the words of the assembler, for the same machine code.
#[test]
fn the_table_says_what_the_assembler_said() {
    if !gpu::available() {
        return;
    }
    for kernel in kernels::ALL {
        assert_eq!(kernel.resources.len(), kernels::MACHINE_CODE.len(), "{}", kernel.name);
        for used in kernel.resources {
            let most = 65_536 / kernel.max_threads.next_multiple_of(128).max(256);
            assert!((8..=most.min(255)).contains(&used.registers), "{}: {used:?}", kernel.name);
            assert!(used.shared <= 48 << 10, "{}: {used:?}", kernel.name);
        }
        assert_eq!(kernel.resources_on((7, 5)), None);
        assert_eq!(kernels::called(kernel.name).map(|found| found.name), Some(kernel.name));
    }
    let adam = kernels::called("adam_update").expect("the optimiser").resources_on((8, 0)).expect("machine code");
    assert_eq!(adam.shared, 0, "it needs no shared memory");
}

/// Every product that computes a weight's gradient in a step of `c`: the weight's name, rows, columns and steps of k.
fn weight_gradients(c: &Config) -> Vec<(String, [usize; 3])> {
    let (_, specs) = UNet::new(&c.model).unwrap();
    let (images, last) = (c.batch / c.accumulate, c.model.levels() - 1);
    let number = |name: &str, start: &str| name.strip_prefix(start)?.split('.').next()?.parse::<usize>().ok();
    let depth = |name: &str| {
        let level = match (number(name, "down_blocks."), number(name, "up_blocks.")) {
            (Some(i), _) => i + usize::from(name.contains("downsamplers")),
            (_, Some(i)) => last - i - usize::from(name.contains("upsamplers")),
            _ if name.starts_with("mid_block") => last,
            _ => 0,
        };
        // The layers of the timestep have a row for each image.
        if name.contains("time_emb") { images } else { images * c.model.size_at(level).pixels() }
    };
    let weights = specs.iter().map(|(_, spec)| spec).filter(|spec| spec.layout != Layout::Vector);
    weights.map(|s| (s.name.clone(), [s.shape.n, s.shape.h * s.shape.w * s.shape.c, depth(&s.name)])).collect()
}

/// Beside the gradient of its input a weight's is cut into fewer segments, as long as they may be: the partial sums of
/// a step are less than seven tenths. All of k is covered, and one segment fewer would be too long.
#[test]
fn few_segments_do_beside_another_product() {
    let [.., largest] = MULTIPROCESSORS;
    let [mut alone, mut beside] = [0; 2];
    for (name, [rows, cols, depth]) in weight_gradients(&Config::preset(Preset::Cifar10)) {
        let tiles = |side: usize| rows.div_ceil(side) * cols.div_ceil(side);
        for (side, resident) in [(64, 3), (128, 2)] {
            let sides = [Some(side), Some(side.min(64))];
            let SplitK { segment, count } = split_in(sides, tiles(side), depth);
            assert!(segment.is_multiple_of(64) && segment * count >= depth && segment * (count - 1) < depth, "{name}");
            // 15/16 of what a multiprocessor does of both products, which its blocks do side by side.
            let longest = 15 * (2 * tiles(side) * depth / largest) / (16 * resident);
            let longest = longest.max(2 * MMA_128.join);
            assert!(segment < longest + 64, "{name}: segments of {segment}, at most {longest}");
            assert!(count == 1 || depth.div_ceil(count - 1) > longest, "{name}: {count} segments of {segment}");
            assert_eq!(split_in([Some(side), None], tiles(side), depth), {
                SplitK::new(if side == 128 { MMA_128 } else { MMA_64 }, tiles(side), depth)
            });
        }
        let parts = |sides| 4 * rows * cols * split_in(sides, tiles(128), depth).count;
        alone += parts([Some(128), None]);
        beside += parts([Some(128), Some(128)]);
    }
    println!("partial sums of a cifar10 step: {beside} bytes beside the other gradients, {alone} alone");
    assert!(10 * beside < 7 * alone, "{beside} bytes of partial sums, {alone} of products of their own");
}

/// What split-K leaves of a GPU, if a multiprocessor holds six blocks and all take as long.
///
/// Where k is long enough for four waves, 3,072 blocks keep A100, RTX 4090 and H100 busy for 3072 / 3240, all and
/// 3072 / 3168 of the time; a multiple of the tiles may fall short of them by all but one. One wave of the smallest GPU
/// fills 648 / 792 of the largest, which is taken where more waves of shorter segments would lose more in their joins.
/// Where k is too short even for that, it is cut as finely as is worth it. Over a whole step, in which joining a
/// segment takes as long as 64 steps of k, 0.948 of four waves and a join after 550 or 1,200 steps leave 0.85 and 0.90;
/// the small network of `mnist` cannot fill a GPU.
#[test]
fn the_last_wave_of_a_weights_gradient_wastes_little() {
    let slots = MULTIPROCESSORS.map(|m| (RESIDENT * m) as f64);
    let [smallest, .., largest] = slots;
    for (preset, at_least) in [(Preset::Mnist, None), (Preset::Cifar10, Some(0.85)), (Preset::CelebaHq256, Some(0.9))] {
        let mut c = Config::preset(preset);
        if preset == Preset::Mnist {
            (c.model.image_size, c.model.channels) = (Size::square(28), 1);
        }
        let products = weight_gradients(&c);
        assert!(products.len() > 20, "{} products of {preset}", products.len());
        let (mut work, mut time) = (0.0, [0.0; 3]);
        for (name, [rows, cols, depth]) in products {
            // The linear layers have the same tiles.
            let (_, tiles) =
                choose([&kernels::conv2d::WGRAD_64X64_F32, &kernels::conv2d::WGRAD_32X128_F32], rows, cols);
            let SplitK { segment, count } = SplitK::new(FMA, tiles, depth);
            let blocks = (tiles * count) as f64;
            let waves = slots.map(|slots| (blocks / slots).ceil());
            let busy = std::array::from_fn::<f64, 3, _>(|g| blocks / (waves[g] * slots[g]));
            println!("{preset} {name}: {rows} x {cols} x {depth}, {tiles} tiles, {count} segments: {busy:.2?}");
            // Of the whole step: with what the segments cost to join, 64 steps of k each.
            work += (tiles * depth) as f64;
            let steps = (segment + if count > 1 { 64 } else { 0 }) as f64;
            (0..3).for_each(|g| time[g] += waves[g] * slots[g] * steps);
            // Cut as finely as is worth it: 128 steps of k a segment, a multiple of 8.
            if count == (depth / 128).max(1) || segment < 128 + 8 {
                continue;
            }
            let short = (tiles - 1) as f64;
            let full = if blocks > largest { (3072.0 - short) / 3240.0 } else { (smallest - short) / largest };
            // Segments are rounded up to multiples of 8, so that fewer may do.
            let bound = full * (1.0 - 7.0 / segment as f64);
            let least = busy.into_iter().fold(1.0, f64::min);
            assert!(
                least >= bound,
                "{name}: {blocks} blocks keep the GPUs busy for {busy:.3?} of the time, not {bound:.3}"
            );
        }
        let busy = time.map(|time| work / time);
        println!("{preset}: {busy:.3?} of all weights' gradients");
        if let Some(at_least) = at_least {
            assert!(busy.iter().all(|busy| *busy >= at_least), "{preset}: {busy:.3?}, expected {at_least}");
        }
    }
}

/// Products in tf32 take no more cycles of shared memory than without bank conflicts, and multiply on tensor cores
/// alone: whole tiles of each shape. What is seen above 1 are the epilogues of convolutions, which read where a row's
/// pixel is stored: rows of a warp are four apart, in two banks. It counts for less the longer k is, hence 5x5 kernels:
/// with 3x3 it was up to 1.058 of the whole, which is no conflict of the products.
#[test]
fn products_in_tf32_waste_no_shared_memory() {
    if !gpu::emulated("what products in tf32 ask of shared memory") {
        return;
    }
    let gpu = Gpu::open(0, Precision::Tf32, false).unwrap();
    gpu.count_launches().unwrap();
    let device = Device::Cuda(gpu.clone());
    for (c_in, c_out) in [(64, 64), (128, 32), (32, 128)] {
        let (xs, ws) = (Shape::new(1, 16, 16, c_in), Shape::new(c_out, 5, 5, c_in));
        let data = |seed, len| to_f32(&numbers(seed, len));
        let weights = [(ws, data(2, ws.len())), (Shape::vector(c_out), data(3, c_out))];
        let dy = data(4, 256 * c_out);
        through_tape_on(&device, &[(xs, data(1, xs.len()))], &weights, &dy, 1, |tape, x, p| {
            conv2d(tape, &x[0], p[0], p[1], Geometry { stride: 1, pad: Pad::all(2) }, Plus::default())
        });
        let weight = (Shape::new(c_out, 1, 1, c_in), data(5, c_out * c_in));
        through_tape_on(&device, &[(xs, data(1, xs.len()))], &[weight], &dy, 1, |tape, x, p| {
            linear(tape, &x[0], p[0], None, None)
        });
    }
    let mut of_kernels = BTreeMap::<&str, [f64; 4]>::new();
    for launch in gpu.counted_launches().iter().map(|counted| Launch::new(counted).unwrap()) {
        let of = of_kernels.entry(launch.kernel.name).or_default();
        let counts = [launch.work.shared_cycles, launch.shared_ideal, launch.work.tf32_flops, launch.flops_outside];
        of.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
    }
    of_kernels.retain(|name, _| name.ends_with("_tf32"));
    assert_eq!(of_kernels.len(), 12, "{of_kernels:?}");
    for (name, [cycles, ideal, in_tf32, outside]) in of_kernels {
        println!("{name}: {:.3} of the cycles without conflicts, {in_tf32} FLOP, {outside} others", cycles / ideal);
        assert!(cycles <= 1.05 * ideal, "{name}: {cycles} cycles, {ideal} without bank conflicts");
        assert!(in_tf32 > 0.0 && outside < 0.05 * in_tf32, "{name}: {in_tf32} FLOP in tf32, {outside} others");
    }
}

/// Attention on tensor cores takes no more cycles of shared memory than without bank conflicts, and moves no more bytes
/// than it asks for: large and small blocks, one head of 256 channels and several of 64.
#[test]
fn attention_on_tensor_cores_wastes_neither_shared_nor_global_memory() {
    if !gpu::emulated("what attention asks of shared and global memory") {
        return;
    }
    let device = Device::Cuda(Gpu::open(0, DType::Bf16, false).unwrap());
    for (shape, heads) in [(Shape::new(1, 16, 16, 24 * 64), 24), (Shape::new(1, 16, 16, 256), 1)] {
        let data = |seed| to_f32(&numbers(seed, shape.len()));
        let inputs = [1, 2, 3].map(|seed| (shape, data(seed)));
        through_tape_on(&device, &inputs, &[], &data(4), 1, |tape, x, _| attention(tape, &x[0], &x[1], &x[2], heads));
    }
    let counters = gpu::counters();
    let number = |kernel: &serde_json::Value, name: &str| kernel[name].as_f64().expect("a counter");
    let kernels = counters["kernels"].as_array().expect("kernels");
    let of_attention = kernels.iter().filter(|kernel| {
        let name = kernel["name"].as_str().expect("a name");
        // Tests beside this one run others, on networks of few channels.
        name.starts_with("attention_") && (name.ends_with("_mma_d64_large") || name.ends_with("_mma_d256_small"))
    });
    let mut count = 0;
    for kernel in of_attention {
        let (cycles, ideal) = (number(kernel, "shared_wavefronts"), number(kernel, "shared_ideal"));
        let sectors = number(kernel, "sector_bytes_per_byte");
        println!("{}: {:.3} of the cycles without conflicts, {sectors:.3} sectors", kernel["name"], cycles / ideal);
        assert!(cycles <= 1.05 * ideal, "{}: {cycles} cycles, {ideal} without bank conflicts", kernel["name"]);
        assert!(sectors <= 1.05, "{}: {sectors} bytes moved for each asked for", kernel["name"]);
        count += 1;
    }
    assert_eq!(count, 6, "kernels of attention on tensor cores");
}

/// A driver of CUDA 12.0 knows PTX up to 8.0, and every GPU from compute capability 8.0 on runs PTX for sm_80.
#[test]
fn drivers_since_cuda_12_know_the_ptx() {
    if !gpu::available() {
        return;
    }
    for module in MODULES {
        let line = |start: &str| {
            module.ptx().lines().find_map(|l| l.strip_prefix(start)).unwrap_or_default().trim().to_string()
        };
        let (version, target) = (line(".version "), line(".target "));
        let (major, minor) = version.split_once('.').unwrap_or_default();
        let version: (u32, u32) = (major.parse().unwrap(), minor.parse().unwrap());
        assert!(((7, 0)..=(8, 0)).contains(&version), "{}: PTX {version:?}", module.stem);
        assert_eq!(target, "sm_80", "{}", module.stem);
    }
}

/// The message that `f` panics with.
fn refusal(f: impl FnOnce()) -> String {
    let panic = catch_unwind(AssertUnwindSafe(f)).expect_err("was not refused");
    *panic.downcast::<String>().expect("a message with numbers in it")
}

#[test]
fn a_launch_that_does_not_fit_the_kernel_is_refused_with_both_sides_named() {
    let Some(gpu) = gpu::gpu(DType::F32) else { return };
    let device = Device::Cuda(gpu.clone());
    let kernel: &'static Kernel = kernels::add::FWD.of(DType::F32);
    let kinds: Vec<Kind> = kernel.params.iter().map(|(kind, _)| *kind).collect();
    assert_eq!(
        kinds,
        [Kind::PointerMut, Kind::Pointer, Kind::Pointer, Kind::U64],
        "the kernel that this test is made for"
    );
    let x = Tensor::full(&device, Shape::vector(4), 1.0).unwrap();
    let y = || Tensor::full(&device, Shape::vector(4), 7.0).unwrap();
    // SAFETY: the one launch that passes the checks has three arrays of four numbers, as the kernel expects.
    let launch = |grid, block: [u32; 3]| unsafe { gpu.launch_any(kernel, grid, block) };
    let start = || launch([1, 1, 1], [256, 1, 1]);
    let mut untouched = y();
    let messages = [
        refusal(|| start().write(&mut untouched).read(&x).read(&x).run().unwrap()),
        refusal(|| start().write(&mut y()).read(&x).read(&x).u32(4).run().unwrap()),
        refusal(|| start().write(&mut y()).read(&x).read(&x).f64(4.0).run().unwrap()),
        refusal(|| start().write(&mut y()).read(&x).u64(4).read(&x).run().unwrap()),
        refusal(|| start().write(&mut y()).read(&x).read(&x).u64(4).u64(4).run().unwrap()),
        // The output must be passed with `write`.
        refusal(|| start().read(&x).read(&x).read(&x).u64(4).run().unwrap()),
        refusal(|| {
            let sizes = kernels::linear::Sizes { rows: 1, c_in: 2, c_out: 3 };
            start().write(&mut y()).read(&x).read(&x).value(sizes).run().unwrap();
        }),
    ];
    for message in &messages {
        for part in ["add_fwd_f32 takes", "(PointerMut, \"y\")", "(U64, \"len\")", "but was launched with", "1x1x1x4"] {
            assert!(message.contains(part), "{message:?} does not say {part:?}");
        }
    }
    assert!(messages[1].contains("(U32, \"4\")"), "{}", messages[1]);
    let says = "(Struct(\"Sizes\", 12), \"Sizes { rows: 1, c_in: 2, c_out: 3 }\")";
    assert!(messages[6].contains(says), "{}", messages[6]);
    assert!(
        refusal(|| drop(launch([1, 1, 1], [257, 1, 1])))
            .contains("add_fwd_f32: blocks of 257 threads, its bound is 256")
    );
    assert!(refusal(|| drop(launch([1, 1, 1], [16, 17, 1]))).contains("272 threads"));
    let tall = refusal(|| launch([1, 65_536, 1], [1, 1, 1]).write(&mut y()).read(&x).read(&x).u64(4).run().unwrap());
    assert!(tall.contains("add_fwd_f32: a grid of 1 x 65536 x 1 blocks"), "{tall}");
    // Nothing reached the driver; the context still works.
    assert_eq!(untouched.to_vec().unwrap(), [7.0; 4]);
    start().write(&mut untouched).read(&x).read(&x).u64(4).run().unwrap();
    assert_eq!(untouched.to_vec().unwrap(), [2.0; 4]);
}

/// A struct argument is compared by name and size; here both differ.
#[test]
fn a_struct_is_compared_by_name_and_size() {
    let Some(gpu) = gpu::gpu(DType::F32) else { return };
    let kernel = &kernels::adam::UPDATE;
    let kind = kernel.params.iter().find(|(_, name)| *name == "factors").expect("a parameter").0;
    assert_eq!(kind, Kind::Struct("AdamFactors", size_of::<kernels::clock::AdamFactors>()));
    // SAFETY: nothing is launched.
    let start = || unsafe { gpu.launch_any(kernel, [1, 1, 1], 256) };
    let message = refusal(|| start().value(kernels::sample_step::Factors::zeroed()).run().unwrap());
    for part in ["(Struct(\"AdamFactors\", 32), \"factors\")", "but was launched with [(Struct(\"Factors\", 52)"] {
        assert!(message.contains(part), "{message:?} does not say {part:?}");
    }
}

#[test]
fn the_newest_ptx_that_runs_is_chosen() {
    let ptx = |capability| Image { capability, ptx: "text" };
    let images = [ptx((8, 0)), ptx((9, 0)), ptx((10, 0))];
    let cases = [
        ((8, 0), Some((8, 0))),
        ((8, 9), Some((8, 0))),
        ((9, 0), Some((9, 0))),
        ((12, 0), Some((10, 0))),
        ((7, 5), None),
    ];
    for (device, want) in cases {
        assert_eq!(best_image(&images, device).copied(), want.map(ptx), "{device:?}");
    }
    assert_eq!(best_image(&[ptx((9, 0))], (8, 0)), None);
}

/// Drivers compile all entries of a module, so each is given alone: complete, and with all that is not an entry.
#[test]
fn an_entry_alone_is_a_module() {
    let text = ".version 7.0\n.global .b8 a[2] = {1, 2};\n.visible .entry s_a(\n.param .u64 s_a_param_0,\n.param .align 4 \
                .b8 s_a_param_1[12]\n)\n.maxntid 64, 1, 1\n{\n\t{ // callseq 0, 0\n\t}\nret;\n}\n.const .b32 c;\n.visible \
                .entry s_ab(.param .f32 x)\n{\nret;\n}\n";
    let (head, between) = (".version 7.0\n.global .b8 a[2] = {1, 2};\n", "\n.const .b32 c;\n");
    let (first, second) = (text.find(".visible").unwrap(), text.rfind(".visible").unwrap());
    let own = &text[first..text.find(between).unwrap()];
    assert_eq!(entry_alone(text, "s_a"), format!("{head}{own}{between}\n"));
    assert_eq!(entry_alone(text, "s_ab"), format!("{head}{between}{}", &text[second..]));
    assert_eq!(entry_alone(text, "s"), format!("{head}{between}\n"));
    assert_eq!((parameters(text, "s_a"), parameters(text, "s_ab")), (Some(vec![8, 12]), Some(vec![4])));
    assert_eq!(parameters(text, "s"), None);
    for kernel in kernels::ALL.iter().filter(|_| gpu::available()) {
        let alone = entry_alone(kernel.module.ptx(), kernel.name);
        assert_eq!(alone.matches(".entry ").count(), 1, "{}", kernel.name);
        let sizes = parameters(&alone, kernel.name).unwrap();
        assert!(sizes.len() == kernel.params.len() && sizes.iter().all(|&bytes| bytes >= 4), "{}", kernel.name);
        for (&bytes, (kind, name)) in sizes.iter().zip(kernel.params) {
            let want = match kind {
                Kind::Pointer | Kind::PointerMut | Kind::U64 | Kind::F64 => 8,
                Kind::U32 | Kind::F32 => 4,
                Kind::Struct(_, bytes) => *bytes,
            };
            assert_eq!(bytes, want, "{} {name}", kernel.name);
        }
    }
}

/// Every module has machine code for each capability that the compiler knows.
#[test]
fn fatbins_hold_machine_code() {
    if !gpu::available() {
        return;
    }
    assert!(kernels::MACHINE_CODE.starts_with(&[(8, 0), (8, 6), (8, 9), (9, 0)]), "{:?}", kernels::MACHINE_CODE);
    for module in MODULES {
        // The magic number of a fatbin, its version, the length of its header and of what follows.
        let [magic, head] = [0, 4].map(|at| u32::from_le_bytes(module.fatbin[at..at + 4].try_into().unwrap()));
        let body = u64::from_le_bytes(module.fatbin[8..16].try_into().unwrap());
        assert_eq!((magic, head), (0xba55_ed50, 0x0010_0001), "{}", module.stem);
        assert_eq!(module.fatbin.len() as u64, 16 + body, "{}", module.stem);
        // Each image has a header with the capability at byte 28, and says how far it is to the next.
        let (mut at, mut found) = (16, Vec::new());
        while at < module.fatbin.len() {
            let word =
                |offset: usize| u32::from_le_bytes(module.fatbin[at + offset..at + offset + 4].try_into().unwrap());
            found.push((word(28) / 10, word(28) % 10));
            at += (word(4) + word(8)) as usize;
        }
        assert_eq!(found, kernels::MACHINE_CODE, "{}", module.stem);
    }
}

/// The launches of each of `count` steps of a warm trainer whose data set is resident on the GPU.
fn launches(c: &Config, precision: Precision, count: usize) -> Option<Vec<Vec<Launched>>> {
    let gpu = gpu::available().then(|| Gpu::open(0, precision, false).unwrap())?;
    let images = (0..20 * 6 * 10 * 3).map(|i| (i * 97 % 251) as u8).collect();
    let train = Dataset::new(Extent { size: c.model.image_size, channels: 3 }, images, None);
    let data = Data { held_out: train.clone(), train, classes: Vec::new(), notes: Vec::new(), skipped: Vec::new() };
    let mut trainer = Trainer::new(c, data, &Device::Cuda(gpu.clone())).unwrap();
    for _ in 0..2 {
        trainer.step().unwrap();
    }
    gpu.record_launches();
    let step = |_| {
        trainer.step().unwrap();
        gpu.recorded_launches()
    };
    Some((0..count).map(step).collect())
}

/// Only the clock changes from one step to the next. All launch arguments are the same to the byte, so that a step can
/// be captured once and launched again. Covers dropout, flips, two micro-batches and warm-up.
#[test]
fn a_step_launches_what_the_last_one_launched() {
    for precision in Precision::ALL {
        let Some(steps) = launches(&support::tiny(6, 10, 3), precision, 3) else { return };
        for stem in ["q_sample", "loss", "dropout", "grad_norm", "adam", "conv2d"] {
            assert!(steps[0].iter().any(|l| l.kernel.starts_with(stem)), "no {stem} among {}", steps[0].len());
        }
        for (number, step) in steps.iter().enumerate().skip(1) {
            assert_eq!(step.len(), steps[0].len(), "launches of step {number} and step 0, {precision}");
            for (k, (launched, first)) in step.iter().zip(&steps[0]).enumerate() {
                assert_eq!(launched, first, "launch {k} of step {number} and of step 0, {precision}");
            }
        }
    }
}
