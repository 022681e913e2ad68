//! mma and wmma, from PTX: one warp, against f64 products of the matrices that the manual's fragment layouts describe.
//!
//! Tolerance of f32 accumulators: k + 1 terms added one by one in f32, each addition within 2^-24 of a partial sum that
//! is at most the sum of the terms' magnitudes; an f16 result is rounded once more (2^-11). Integers and f64 of small
//! integers are exact.

use super::harness::available;
use super::reference::{Format, convert, integer};
use cuda_emu::exec::{Isa, Launch, LoadedModule, Settings};
use cuda_emu::memory::Memory;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use std::sync::Arc;

/// A matrix of element bits, row-major.
struct Matrix {
    ty: &'static str,
    columns: usize,
    bits: Vec<u64>,
}

impl Matrix {
    fn value(&self, row: usize, column: usize) -> f64 {
        let bits = self.bits[row * self.columns + column];
        match self.ty {
            // The 13 low bits of a tf32 do not count.
            "tf32" => f32::from_bits(bits as u32 & 0xffff_e000) as f64,
            "u8" | "s8" | "s32" => integer(self.ty, bits) as f64,
            ty => Format::of(ty).value(bits),
        }
    }

    /// Random elements; `exact` ones are small integers.
    fn random(ty: &'static str, rows: usize, columns: usize, exact: bool, random: &mut StdRng) -> Matrix {
        let mut element = || {
            if matches!(ty, "u8" | "s8" | "s32") {
                return random.random::<u32>() as u64 & if ty == "s32" { 0xffff_ffff } else { 0xff };
            }
            let x: f64 = if exact {
                random.random_range(-8..=8) as f64
            } else {
                random.random_range(-2.0..2.0) * 2f64.powi(random.random_range(-6..3))
            };
            let to = if ty == "tf32" { Format::F32 } else { Format::of(ty) };
            convert(Format::F64, to, x.to_bits(), "rn")
        };
        Matrix { ty, columns, bits: (0..rows * columns).map(|_| element()).collect() }
    }
}

fn bytes_of(ty: &str) -> usize {
    match ty {
        "u8" | "s8" => 1,
        "f16" | "bf16" => 2,
        "f64" => 8,
        _ => 4,
    }
}

/// Runs a kernel of one warp with pointers as parameters; gives back the last buffer.
fn launch(text: &str, buffers: &[Vec<u8>], isa: Isa) -> Result<Vec<u8>, String> {
    let text = format!(".version 7.0\n.target sm_80\n.address_size 64\n{text}");
    let module = cuda_emu::ptx::parse(&text).map_err(|e| format!("PTX: {e}"))?;
    let memory = Memory::new(1 << 22);
    let loaded = LoadedModule::load(&memory, Arc::new(module)).ok_or("the module does not fit")?;
    let mut params = Vec::new();
    let mut last = 0;
    for buffer in buffers {
        last = memory.alloc(buffer.len() as u64).ok_or("no memory")?;
        memory.copy_in(last, buffer).map_err(|e| format!("{e:?}"))?;
        params.extend(last.to_le_bytes());
    }
    let kernel = loaded.module.kernels[0].clone();
    let launch = Launch {
        kernel: &kernel,
        module: &loaded,
        grid: [1; 3],
        block: [32, 1, 1],
        dynamic_shared: 0,
        params: &params,
        multiprocessors: 1,
        cooperative: false,
    };
    let settings = Settings { threads: 1, isa: Some(isa), ..Settings::default() };
    cuda_emu::exec::launch(&memory, &launch, &settings).map_err(|fault| format!("launch: {fault}"))?;
    let mut result = buffers.last().map_or(Vec::new(), |b| vec![0; b.len()]);
    memory.copy_out(last, &mut result).map_err(|e| format!("{e:?}"))?;
    Ok(result)
}

/// Compares D with A B + C, element (row, column) of D given by `found`.
fn judge(
    a: &Matrix,
    b: &Matrix,
    c: &Matrix,
    saturate: bool,
    d_type: &str,
    shape: [usize; 3],
    found: impl Fn(usize, usize) -> u64,
) -> Result<(), String> {
    let [m, n, k] = shape;
    for row in 0..m {
        for column in 0..n {
            let products = (0..k).map(|i| a.value(row, i) * b.value(i, column));
            let exact = products.clone().sum::<f64>() + c.value(row, column);
            let size = products.map(f64::abs).sum::<f64>() + c.value(row, column).abs();
            let bits = found(row, column);
            let right = match d_type {
                "s32" => {
                    let expected = if saturate {
                        (exact as i64).clamp(i32::MIN as i64, i32::MAX as i64) as u32
                    } else {
                        exact as i64 as u32
                    };
                    bits == expected as u64
                }
                "f64" => f64::from_bits(bits) == exact,
                ty => {
                    let rounding = if ty == "f16" { exact.abs() * 2f64.powi(-11) + 2f64.powi(-25) } else { 0.0 };
                    (Format::of(ty).value(bits) - exact).abs() <= (k + 1) as f64 * 2f64.powi(-24) * size + rounding
                }
            };
            if !right {
                return Err(format!("d[{row}][{column}] is {bits:#x}, not {exact:e}"));
            }
        }
    }
    Ok(())
}

/// (row, column) of element i that lane l holds of a factor or accumulator, as the manual gives it for `mma`.
type Layout = fn(usize, usize) -> (usize, usize);

/// An `mma` form: shape m, n, k; types of d, a, b, c; elements per lane of a, b, c with their layouts.
struct Form {
    shape: [usize; 3],
    types: [&'static str; 4],
    satfinite: bool,
    a: (usize, Layout),
    b: (usize, Layout),
    c: (usize, Layout),
}

fn mma_forms() -> Vec<Form> {
    let accumulator: (usize, Layout) = (4, |l, i| (l / 4 + if i < 2 { 0 } else { 8 }, l % 4 * 2 + (i & 1)));
    let narrow_accumulator: (usize, Layout) = (2, |l, i| (l / 4, l % 4 * 2 + i));
    let mut forms = Vec::new();
    for (element, accumulators) in [("f16", vec!["f32", "f16"]), ("bf16", vec!["f32"])] {
        for d in &accumulators {
            for c in &accumulators {
                forms.push(Form {
                    shape: [16, 8, 16],
                    types: [d, element, element, c],
                    satfinite: false,
                    a: (8, |l, i| {
                        (
                            l / 4 + if i < 2 || (4..6).contains(&i) { 0 } else { 8 },
                            l % 4 * 2 + (i & 1) + if i < 4 { 0 } else { 8 },
                        )
                    }),
                    b: (4, |l, i| (l % 4 * 2 + (i & 1) + if i < 2 { 0 } else { 8 }, l / 4)),
                    c: accumulator,
                });
                forms.push(Form {
                    shape: [16, 8, 8],
                    types: [d, element, element, c],
                    satfinite: false,
                    a: (4, |l, i| (l / 4 + if i < 2 { 0 } else { 8 }, l % 4 * 2 + (i & 1))),
                    b: (2, |l, i| (l % 4 * 2 + i, l / 4)),
                    c: accumulator,
                });
            }
        }
    }
    forms.push(Form {
        shape: [16, 8, 8],
        types: ["f32", "tf32", "tf32", "f32"],
        satfinite: false,
        a: (4, |l, i| (l / 4 + if i == 0 || i == 2 { 0 } else { 8 }, l % 4 + if i < 2 { 0 } else { 4 })),
        b: (2, |l, i| (l % 4 + if i == 0 { 0 } else { 4 }, l / 4)),
        c: accumulator,
    });
    forms.push(Form {
        shape: [16, 8, 4],
        types: ["f32", "tf32", "tf32", "f32"],
        satfinite: false,
        a: (2, |l, i| (l / 4 + if i == 0 { 0 } else { 8 }, l % 4)),
        b: (1, |l, _| (l % 4, l / 4)),
        c: accumulator,
    });
    forms.push(Form {
        shape: [8, 8, 4],
        types: ["f64"; 4],
        satfinite: false,
        a: (1, |l, _| (l / 4, l % 4)),
        b: (1, |l, _| (l % 4, l / 4)),
        c: narrow_accumulator,
    });
    for a in ["u8", "s8"] {
        for b in ["u8", "s8"] {
            for satfinite in [false, true] {
                let types = ["s32", a, b, "s32"];
                forms.push(Form {
                    shape: [8, 8, 16],
                    types,
                    satfinite,
                    a: (4, |l, i| (l / 4, l % 4 * 4 + i)),
                    b: (4, |l, i| (l % 4 * 4 + i, l / 4)),
                    c: narrow_accumulator,
                });
                forms.push(Form {
                    shape: [16, 8, 16],
                    types,
                    satfinite,
                    a: (8, |l, i| (l / 4 + if i < 4 { 0 } else { 8 }, l % 4 * 4 + (i & 3))),
                    b: (4, |l, i| (l % 4 * 4 + i, l / 4)),
                    c: accumulator,
                });
                forms.push(Form {
                    shape: [16, 8, 32],
                    types,
                    satfinite,
                    a: (16, |l, i| {
                        (
                            l / 4 + if i < 4 || (8..12).contains(&i) { 0 } else { 8 },
                            l % 4 * 4 + (i & 3) + if i < 8 { 0 } else { 16 },
                        )
                    }),
                    b: (8, |l, i| (l % 4 * 4 + (i & 3) + if i < 4 { 0 } else { 16 }, l / 4)),
                    c: accumulator,
                });
            }
        }
    }
    forms
}

/// Registers of `count` elements: packed in 32 bits, or one of 64.
fn registers(ty: &str, count: usize) -> usize {
    (count * bytes_of(ty)).div_ceil(if ty == "f64" { 8 } else { 4 })
}

/// Bytes of all lanes' registers, lane after lane.
fn fragment(matrix: &Matrix, (count, layout): (usize, Layout)) -> Vec<u8> {
    let mut bytes = Vec::new();
    for lane in 0..32 {
        for i in 0..count {
            let (row, column) = layout(lane, i);
            bytes.extend(&matrix.bits[row * matrix.columns + column].to_le_bytes()[..bytes_of(matrix.ty)]);
        }
    }
    bytes
}

fn mma_kernel(form: &Form) -> (String, String) {
    let [m, n, k] = form.shape;
    let [d, a, b, c] = form.types;
    let name = format!(
        "mma.sync.aligned.m{m}n{n}k{k}.row.col{}.{d}.{a}.{b}.{c}",
        if form.satfinite { ".satfinite" } else { "" }
    );
    let class = |ty: &str| match ty {
        "f32" => "f32",
        "f64" => "f64",
        _ => "b32",
    };
    let mut text = String::from(
        ".visible .entry k(.param .u64 pa, .param .u64 pb, .param .u64 pc, .param .u64 pd)\n{\n\
         .reg .b32 %t;\n.reg .b64 %p;\nmov.u32 %t, %tid.x;\n",
    );
    let mut lists = Vec::new();
    for (letter, ty, count) in [("a", a, form.a.0), ("b", b, form.b.0), ("c", c, form.c.0), ("d", d, form.c.0)] {
        let count = registers(ty, count);
        let step = if ty == "f64" { 8 } else { 4 };
        text += &format!(".reg .{} %{letter}<{count}>;\n", class(ty));
        let names: Vec<String> = (0..count).map(|i| format!("%{letter}{i}")).collect();
        if letter == "d" {
            text += &format!("{name} {{{}}}, {{{}}}, {{{}}}, {{{}}};\n", names.join(","), lists[0], lists[1], lists[2]);
        }
        text += &format!("ld.param.u64 %p, [p{letter}];\nmad.wide.u32 %p, %t, {}, %p;\n", count * step);
        for (i, register) in names.iter().enumerate() {
            text += &if letter == "d" {
                format!("st.global.{} [%p+{}], {register};\n", class(ty), i * step)
            } else {
                format!("ld.global.{} {register}, [%p+{}];\n", class(ty), i * step)
            };
        }
        lists.push(names.join(","));
    }
    (name, text + "ret;\n}\n")
}

#[test]
fn mma() {
    let mut random = StdRng::seed_from_u64(11);
    let mut failures = Vec::new();
    for form in mma_forms() {
        let [m, n, k] = form.shape;
        let [d, a, b, c] = form.types;
        let (name, text) = mma_kernel(&form);
        for (_, isa) in available() {
            for round in 0..6 {
                let exact = round == 0 || d == "f64";
                let a = Matrix::random(a, m, k, exact, &mut random);
                let b = Matrix::random(b, k, n, exact, &mut random);
                let c = Matrix::random(c, m, n, exact, &mut random);
                let d_bytes = 32 * form.c.0 * bytes_of(d);
                let buffers = [fragment(&a, form.a), fragment(&b, form.b), fragment(&c, form.c), vec![0xff; d_bytes]];
                let result = launch(&text, &buffers, isa).and_then(|bytes| {
                    let mut found = vec![0u64; m * n];
                    for (index, element) in bytes.chunks(bytes_of(d)).enumerate() {
                        let (row, column) = (form.c.1)(index / form.c.0, index % form.c.0);
                        let mut wide = [0; 8];
                        wide[..element.len()].copy_from_slice(element);
                        found[row * n + column] = u64::from_le_bytes(wide);
                    }
                    judge(&a, &b, &c, form.satfinite, d, form.shape, |row, column| found[row * n + column])
                });
                if let Err(why) = result {
                    failures.push(format!("{name} on {isa:?}: {why}"));
                    break;
                }
            }
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

/// An infinity times zero, and an overflow, in one product: the canonical NaN, and infinity.
#[test]
fn mma_of_infinities() {
    let forms: Vec<Form> = mma_forms().into_iter().filter(|f| f.types[0] == "f32" && f.types[3] == "f32").collect();
    assert!(forms.len() >= 6, "{} forms with f32 accumulators", forms.len());
    for form in &forms {
        let [m, n, k] = form.shape;
        let (name, text) = mma_kernel(form);
        let element = if form.types[1] == "tf32" { Format::F32 } else { Format::of(form.types[1]) };
        let filled = |ty, rows: usize, columns: usize| Matrix { ty, columns, bits: vec![0; rows * columns] };
        let (mut a, mut b, c) = (filled(form.types[1], m, k), filled(form.types[2], k, n), filled("f32", m, n));
        a.bits[0] = element.exponent_mask();
        b.bits[1] = element.one();
        let buffers = [fragment(&a, form.a), fragment(&b, form.b), fragment(&c, form.c), vec![0; 32 * form.c.0 * 4]];
        for (_, isa) in available() {
            let bytes = launch(&text, &buffers, isa).unwrap_or_else(|why| panic!("{name}: {why}"));
            for (index, word) in bytes.chunks(4).enumerate() {
                let (row, column) = (form.c.1)(index / form.c.0, index % form.c.0);
                let expected = match (row, column) {
                    (0, 1) => 0x7f80_0000,
                    (0, _) => 0x7fff_ffff,
                    _ => 0u32,
                };
                assert_eq!(
                    u32::from_le_bytes(word.try_into().expect("4 bytes")),
                    expected,
                    "{name} on {isa:?}: d[{row}][{column}]"
                );
            }
        }
    }
}

/// A `wmma` shape and types: m, n, k; d, a, b, c; registers of a, b, c, d as the manual has them.
type Wmma = ([usize; 3], [&'static str; 4], [usize; 4]);

fn wmma_forms() -> Vec<Wmma> {
    let mut forms = Vec::new();
    for shape in [[16, 16, 16], [32, 8, 16], [8, 32, 16]] {
        for d in ["f32", "f16"] {
            for c in ["f32", "f16"] {
                let count = |ty| if ty == "f32" { 8 } else { 4 };
                forms.push((shape, [d, "f16", "f16", c], [8, 8, count(c), count(d)]));
            }
        }
        let (a, b) = match shape[0] {
            16 => (4, 4),
            32 => (8, 2),
            _ => (2, 8),
        };
        forms.push((shape, ["f32", "bf16", "bf16", "f32"], [a, b, 8, 8]));
        for ty in ["u8", "s8"] {
            forms.push((shape, ["s32", ty, ty, "s32"], [a / 2, b / 2, 8, 8]));
        }
    }
    forms.push(([16, 16, 8], ["f32", "tf32", "tf32", "f32"], [4, 4, 8, 8]));
    forms.push(([8, 8, 4], ["f64"; 4], [1, 1, 2, 2]));
    forms
}

/// All layouts of all four matrices, rows padded, every instruction set.
#[test]
fn wmma() {
    let mut random = StdRng::seed_from_u64(12);
    let mut failures = Vec::new();
    for (shape, types, counts) in wmma_forms() {
        let [m, n, k] = shape;
        let [d_type, a_type, b_type, c_type] = types;
        for layouts in 0..16 {
            let layout = |i: usize| if layouts >> i & 1 == 0 { "row" } else { "col" };
            let name_of_shape = format!("m{m}n{n}k{k}");
            let name = match (a_type, a_type == "f64") {
                ("f16", _) => {
                    format!("wmma.mma.sync.aligned.{}.{}.{name_of_shape}.{d_type}.{c_type}", layout(0), layout(1))
                }
                (_, f64) => format!(
                    "wmma.mma.sync.aligned.{}.{}.{name_of_shape}{}.{d_type}.{a_type}.{b_type}.{c_type}",
                    layout(0),
                    layout(1),
                    if f64 { ".rn" } else { "" }
                ),
            };
            let class = |ty: &str| match ty {
                "f32" => "f32",
                "f64" => "f64",
                _ => "b32",
            };
            let mut text = String::from(
                ".visible .entry k(.param .u64 pa, .param .u64 pb, .param .u64 pc, .param .u64 pd)\n{\n.reg .b64 %p;\n",
            );
            let mut lists: Vec<String> = Vec::new();
            let mut buffers = Vec::new();
            let mut matrices = Vec::new();
            let mut strides = Vec::new();
            for (i, (letter, ty, [rows, columns])) in
                [("a", a_type, [m, k]), ("b", b_type, [k, n]), ("c", c_type, [m, n]), ("d", d_type, [m, n])]
                    .into_iter()
                    .enumerate()
            {
                // Rows of 16-byte multiples, one such beyond the matrix.
                let line = if layout(i) == "row" { columns } else { rows };
                let stride = line + 16 / bytes_of(ty);
                strides.push(stride);
                text += &format!(".reg .{} %{letter}<{}>;\n", class(ty), counts[i]);
                let list = (0..counts[i]).map(|r| format!("%{letter}{r}")).collect::<Vec<_>>().join(",");
                let lines = if layout(i) == "row" { rows } else { columns };
                let mut bytes = vec![0; lines * stride * bytes_of(ty)];
                if letter == "d" {
                    text += &format!("{name} {{{list}}}, {{{}}}, {{{}}}, {{{}}};\n", lists[0], lists[1], lists[2]);
                    text += &format!(
                        "ld.param.u64 %p, [pd];\n\
                         wmma.store.d.sync.aligned.{}.{name_of_shape}.global.{ty} [%p], {{{list}}}, {stride};\n",
                        layout(i)
                    );
                } else {
                    let matrix = Matrix::random(ty, rows, columns, layouts == 0 || ty == "f64", &mut random);
                    for row in 0..rows {
                        for column in 0..columns {
                            let at = if layout(i) == "row" { row * stride + column } else { column * stride + row };
                            let size = bytes_of(ty);
                            bytes[at * size..][..size]
                                .copy_from_slice(&matrix.bits[row * columns + column].to_le_bytes()[..size]);
                        }
                    }
                    matrices.push(matrix);
                    text += &format!(
                        "ld.param.u64 %p, [p{letter}];\n\
                         wmma.load.{letter}.sync.aligned.{}.{name_of_shape}.global.{ty} {{{list}}}, [%p], \
                         {stride};\n",
                        layout(i)
                    );
                }
                lists.push(list);
                buffers.push(bytes);
            }
            text += "ret;\n}\n";
            for (_, isa) in available() {
                let result = launch(&text, &buffers, isa).and_then(|bytes| {
                    judge(&matrices[0], &matrices[1], &matrices[2], false, d_type, shape, |row, column| {
                        let at = if layout(3) == "row" { row * strides[3] + column } else { column * strides[3] + row };
                        let size = bytes_of(d_type);
                        let mut wide = [0; 8];
                        wide[..size].copy_from_slice(&bytes[at * size..][..size]);
                        u64::from_le_bytes(wide)
                    })
                });
                if let Err(why) = result {
                    failures.push(format!("{name}, c {}, d {} on {isa:?}: {why}", layout(2), layout(3)));
                }
            }
        }
    }
    assert!(failures.is_empty(), "{} wrong: {:#?}", failures.len(), &failures[..failures.len().min(20)]);
}

/// Runs of products are planned together: shared factors are prepared once, and two products with the same A are
/// multiplied at once. Random products on few registers, so that D overwrites A, B or C of its neighbours and factors
/// prepared long before, must give the same as the same products one by one.
#[test]
fn products_in_a_row_are_as_apart() {
    let mut random = StdRng::seed_from_u64(12);
    let forms = [
        ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", [4, 4, 2, 4]),
        ("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", [4, 4, 2, 4]),
        ("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16", [2, 4, 2, 2]),
        ("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32", [4, 2, 1, 4]),
        ("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", [4, 4, 2, 4]),
        ("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32", [4, 4, 2, 4]),
        ("wmma.mma.sync.aligned.row.col.m16n16k16.f32.bf16.bf16.f32", [8, 4, 4, 8]),
        ("wmma.mma.sync.aligned.row.col.m32n8k16.f32.bf16.bf16.f32", [8, 8, 2, 8]),
    ];
    const REGISTERS: usize = 64;
    let each = |text: &dyn Fn(usize) -> String| (0..REGISTERS).map(text).collect::<String>();
    let loads = each(&|i| format!("ld.global.u32 %r{i}, [%rd3+{}];\n", 4 * i));
    let stores = each(&|i| format!("st.global.u32 [%rd3+{}], %r{i};\n", 4 * i));
    let kernel = |products: &str| {
        format!(
            ".visible .entry k(.param .u64 io) {{\n.reg .b32 %r<{}>;\n.reg .b64 %rd<4>;\n
             ld.param.u64 %rd1, [io];\nmov.u32 %r{REGISTERS}, %tid.x;\n
             mad.wide.u32 %rd3, %r{REGISTERS}, {}, %rd1;\n{loads}{products}{stores}ret;\n}}\n",
            REGISTERS + 1,
            4 * REGISTERS
        )
    };
    for (form, [d_count, a_count, b_count, c_count]) in forms {
        for round in 0..20 {
            // Many that leave the factors alone, so that slots are reused; or few, which may overwrite each other's
            // factors.
            let many = round % 2 == 0;
            let list = |first: usize, count: usize| {
                let names: Vec<String> = (first..first + count).map(|i| format!("%r{i}")).collect();
                format!("{{{}}}", names.join(","))
            };
            let products: Vec<String> = (0..if many { 40 } else { 12 })
                .map(|_| {
                    // Two A's, nine B's, and accumulators.
                    let a = random.random_range(0..2) * a_count;
                    let b = 16 + random.random_range(0..9) * b_count;
                    let mut sums = |count: usize| {
                        let first = if many || random.random_bool(0.7) { 16 + 9 * b_count } else { 0 };
                        let place = random.random_range(0..(REGISTERS - first) / count);
                        first + place * count
                    };
                    let (d, c) = (sums(d_count), sums(c_count));
                    let lists = [list(d, d_count), list(a, a_count), list(b, b_count), list(c, c_count)];
                    format!("{form} {};\n", lists.join(", "))
                })
                .collect();
            // Words whose sums, used as factors of any type, seldom overflow: infinities and NaN would hide
            // differences.
            let input: Vec<u8> = (0..32 * REGISTERS)
                .flat_map(|_| [0u32, 0x3f80_0000, 0xbf80_3f80, 0x3f80_3f80][random.random_range(0..4)].to_le_bytes())
                .collect();
            for (_, isa) in available() {
                let run = |products: &str| {
                    launch(&kernel(products), std::slice::from_ref(&input), isa)
                        .unwrap_or_else(|why| panic!("{form}: {why}"))
                };
                let (together, apart) = (run(&products.concat()), run(&products.join("bar.warp.sync -1;\n")));
                assert!(together == apart, "{form} on {isa:?}");
                let finite = |word: &&[u8]| (word[3] & 0x7f, word[2]) < (0x7f, 0x80);
                assert!(apart != input && 2 * apart.chunks(4).filter(finite).count() > 32 * REGISTERS, "{form}");
            }
        }
    }
}
